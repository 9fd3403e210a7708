"""Peers of the online path for the benchmark `rtp`: what others would run in its place, on the same data, each tuned.

    data.write_world(folder, items, users, length, seed, candidates, requests)     the data, once
    environment.environment()                                                      the peers' own Python, made once
    <that python> -m tests.bench.peers PEER FOLDER                                 a process per peer, line by line
    <that python> -m tests.bench.peers check FOLDER                                scores against the training form
    <that python> -m tests.bench.peers.towers FOLDER SEED ROUNDS                   the user tower alone, in turns

| peer | the items' side | what computes |
|---|---|---|
| sequential-torch, sequential-onnx | features, from this process's arrays | the training form's forward pass |
| redis-onnx | records of 192 bytes, redis-server by MGET | the folded form in ONNX Runtime, SimTier in numba |
| rocksdb-onnx | the same, rocksdict's `get(list)` | the same |
| feast-onnx | the same, `get_online_features` | the same |
| attention-torch, attention-onnx | rows, from this process's arrays | DIN over all L behaviours |

All use one thread, compute the user's side within the request, and take history and profile from their own arrays,
which is in their favour. All but attention give the same scores as the product: within 1e-4 of the training form from
features, within 5e-3 from fp16 records.

How each was tuned, on two AVX-512 cores, a million items, 10,000 candidates, L = 1,000:

- All: what depends on the user alone runs once per request, the rest in chunks of candidates whose intermediates stay
  in the cache (tried: 256 to 10,000 for the stacks, 256 to 2,048 for sequential; attention's tile was there before).
  Sorting and searching, which do not export, are done in NumPy. Crosses that no item has are not carried along. ONNX
  Runtime: one thread, sequential, all graph optimisations.
- sequential: the [K, L] products of signatures are whole numbers, so they are multiplied exactly in int8 (VNNI): 8 ms
  instead of 26 in ONNX Runtime, 7 instead of 13 in torch's bf16. SimTier's counts are sums of the products cut
  between two numbers, without masks: 15 ms instead of 24 in ONNX Runtime, 14 instead of 50 in torch (tried too:
  embedding_bag over a table of tiers, comparisons of int8, products with ones). The form is not folded, as that is
  what the product adds: LSH-DIN is a product with the tokens. torch.compile would need a C++ compiler and was not
  tried.
- stacks: the record is the product's, and so is the fold, on both sides; SimTier is counted by numba, 4 to 6 ms
  instead of some 23 in the graph (the two parts above, timed apart). Redis: Unix socket, no persistence, binary keys,
  hiredis, MGET in a pipeline; 250 to 10,000 keys per MGET are the same within 10 to 15 %, and so is hiredis without
  redis-py around it, because 12 of some 17 ms are the server's. RocksDB: a cuckoo table in mapped files, compacted
  and warm, the best of those tried when the project began (block cache with bloom filters 27 ms, mapped blocks 18,
  PlainTable 12, cuckoo 8). Feast: all million rows, one bytes feature; SQLite took two thirds of the time of Feast's
  Redis store (on 40,000 rows); values are read from the answer's protobuf, past `to_dict`.
- attention: the form of tests/bench/serving_forms.py, whose first layer is one matrix per candidate, in tiles of 32;
  torch in bf16, ONNX Runtime in fp32, which is the quicker one. All around it is the product's own fold and kernel.
"""
