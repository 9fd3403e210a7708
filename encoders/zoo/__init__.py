"""Published ranking models, as material for the runtime (api/runtime) and its benchmark: WnD, DIN, DLRM, BST.

Each is one file: a frozen config with the sizes of the benchmark, and a module whose `forward` takes the tensors of one
query. What belongs to the user has U rows and what belongs to the candidates N rows, and U is 1 or N: with one row the
user's half of the first layer is computed once for the query, and the result is the same. Sizes follow DeepRecSys
(Gupta et al., ISCA 2020) where it names them. Outputs are logits [N].
"""
