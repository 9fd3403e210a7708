"""The published models against well-kept implementations with copied weights, or against the paper's sums; and one user
for all candidates against a user per candidate.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.zoo.bst import BST, BSTConfig
from encoders.zoo.din import DIN, DINConfig
from encoders.zoo.dlrm import DLRM, DLRMConfig
from encoders.zoo.layers import Perceptron, Tables
from encoders.zoo.wnd import WideAndDeep, WideAndDeepConfig
from tests.encoders.test_peers import deepctr_layers

__all__ = ["deepctr_layers"]

N, ROWS, LENGTH = 6, 20, 7
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def ids(*shape: int) -> Tensor:
    return torch.randint(1, ROWS, shape)


def tables_of(ours: Tables) -> list[Tensor]:
    return list(ours.weight.detach().split(ROWS))


def set_to(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def copy_rest(ours: Perceptron, theirs: list[nn.Linear]) -> None:
    """All but the first layer; the last one's bias only where theirs has one."""
    for mine, other in zip(ours.layers, theirs, strict=True):
        assert isinstance(mine, nn.Linear)
        set_to(other.weight, mine.weight)
        if other.bias is not None:
            set_to(other.bias, mine.bias)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.mark.usefixtures("deepctr_layers")
def test_wide_and_deep_is_deepctrs() -> None:
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models.wdl import WDL

    config = WideAndDeepConfig(user_tables=3, item_tables=2, rows=ROWS, dim=4, dense=2, hidden=(9, 7, 5))
    ours = WideAndDeep(config)
    names = [f"t{at}" for at in range(5)]
    columns = [*(SparseFeat(name, ROWS, embedding_dim=4) for name in names), DenseFeat("dense", 2)]
    theirs = WDL(columns, columns, dnn_hidden_units=config.hidden).eval()
    for name, wide, deep in zip(
        names,
        tables_of(ours.user_wide) + tables_of(ours.item_wide),
        tables_of(ours.user_deep) + tables_of(ours.item_deep),
        strict=True,
    ):
        set_to(theirs.linear_model.embedding_dict[name].weight, wide)
        set_to(theirs.embedding_dict[name].weight, deep)
    set_to(theirs.linear_model.weight, ours.wide.weight.T)
    user, item = ours.first.user.weight, ours.first.item.weight
    set_to(theirs.dnn.linears[0].weight, torch.cat([user[:, :12], item, user[:, 12:]], dim=1))
    set_to(theirs.dnn.linears[0].bias, ours.first.user.bias)
    copy_rest(ours.rest, [*theirs.dnn.linears[1:], theirs.dnn_linear])
    set_to(theirs.out.bias, ours.wide.bias + ours.rest.layers[-1].get_parameter("bias"))
    user_ids, dense, item_ids = ids(N, 3), torch.randn(N, 2), ids(N, 2)
    with torch.no_grad():
        wanted = theirs(torch.cat([user_ids.float(), item_ids.float(), dense], dim=1)).squeeze(1)
        found = ours(user_ids, dense, item_ids)
    torch.testing.assert_close(torch.sigmoid(found), wanted, **CLOSE)
    assert found.std() > 0.02


@pytest.mark.usefixtures("deepctr_layers")
def test_din_is_deepctrs() -> None:
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models.din import DIN as Theirs  # noqa: N811

    config = DINConfig(rows=ROWS, dim=4, profile_tables=2, behaviours=LENGTH, attention=(6, 5), hidden=(9, 7))
    ours = DIN(config)
    pair, profile = ["item", "category"], ["p0", "p1"]
    columns: list[Any] = [SparseFeat(name, ROWS, embedding_dim=4) for name in (*profile, *pair)]
    for name in pair:
        base = SparseFeat(f"hist_{name}", ROWS, embedding_dim=4, embedding_name=name)
        columns.append(VarLenSparseFeat(base, LENGTH, length_name="length"))
    theirs = Theirs(
        columns, pair, dnn_hidden_units=config.hidden, att_hidden_size=config.attention, att_activation="sigmoid"
    ).eval()
    for name, table in zip([*profile, *pair], tables_of(ours.profile) + tables_of(ours.pairs), strict=True):
        set_to(theirs.embedding_dict[name].weight, table)
    unit = theirs.attention.local_att
    nothing = torch.zeros_like(ours.key.weight)
    first = [ours.query.weight, ours.key.weight, nothing, ours.both.weight]  # of [x, e, x - e, x e]
    set_to(unit.dnn.linears[0].weight, torch.cat(first, dim=1))
    set_to(unit.dnn.linears[0].bias, ours.query.bias)
    for mine, other in zip(ours.unit, [*unit.dnn.linears[1:], unit.dense], strict=True):
        set_to(other.weight, mine.get_parameter("weight"))
        set_to(other.bias, mine.get_parameter("bias"))
    set_to(theirs.dnn.linears[0].weight, torch.cat([ours.first.user.weight, ours.first.item.weight], dim=1))
    set_to(theirs.dnn.linears[0].bias, ours.first.user.bias)
    copy_rest(ours.rest, [*theirs.dnn.linears[1:], theirs.dnn_linear])
    set_to(theirs.out.bias, ours.rest.layers[-1].get_parameter("bias"))
    lengths = torch.tensor([7, 1, 3, 6, 7, 2])
    valid = torch.arange(LENGTH) < lengths[:, None]
    user, history, item = ids(N, 2), ids(N, LENGTH, 2) * valid[:, :, None], ids(N, 2)
    given = {name: user[:, [at]] for at, name in enumerate(profile)}
    given |= {name: item[:, [at]] for at, name in enumerate(pair)}
    given |= {f"hist_{name}": history[:, :, at] for at, name in enumerate(pair)} | {"length": lengths[:, None]}
    with torch.no_grad():
        wanted = theirs(torch.cat([given[name].float() for name in theirs.feature_index], dim=1)).squeeze(1)
        found = ours(user, history, valid, item)
    torch.testing.assert_close(torch.sigmoid(found), wanted, **CLOSE)
    assert found.std() > 0.02


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_bst_is_torch_rechubs() -> None:
    """All behaviours are there: theirs tells padding by the id alone."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.ranking.bst import BST as Theirs  # noqa: N811

    config = BSTConfig(rows=ROWS, dim=8, heads=2, behaviours=LENGTH, feed=2_048, profile_tables=2, hidden=(9, 7, 5))
    ours = BST(config)
    nn.init.normal_(ours.pairs.weight)
    pair, profile = ["item", "category"], ["p0", "p1"]
    features = [SparseFeature(name, ROWS, 4) for name in profile]
    targets = [SparseFeature(name, ROWS, 4) for name in pair]
    past = [SequenceFeature(f"hist_{name}", ROWS, 4, pooling="concat", shared_with=name) for name in pair]
    perceptron = {"dims": list(config.hidden), "activation": "relu", "dropout": 0.0}
    theirs = Theirs(features, past, targets, perceptron, nhead=2, dropout=0.0, max_seq_len=LENGTH + 1).eval()
    for name, table in zip([*profile, *pair], tables_of(ours.profile) + tables_of(ours.pairs), strict=True):
        set_to(theirs.embedding.embed_dict[name].weight, table)
    set_to(theirs.pos_embedding.weight, ours.places)
    (block,) = theirs.transformer_layers.layers
    parts = (ours.query, ours.keys, ours.values)
    set_to(block.self_attn.in_proj_weight, torch.cat([part.weight for part in parts]))
    set_to(block.self_attn.in_proj_bias, torch.cat([part.bias for part in parts]))
    for mine, other in (
        (ours.out, block.self_attn.out_proj),
        (ours.inner, block.linear1),
        (ours.outer, block.linear2),
        (ours.norm, block.norm1),
        (ours.norm_feed, block.norm2),
    ):
        set_to(other.weight, mine.get_parameter("weight"))
        set_to(other.bias, mine.get_parameter("bias"))
    linear = [layer for layer in theirs.mlp.mlp if isinstance(layer, nn.Linear)]
    for norm in theirs.mlp.mlp:
        if isinstance(norm, nn.BatchNorm1d):
            norm.eps = 0.0
    set_to(linear[0].weight, torch.cat([ours.first.item.weight, ours.first.user.weight], dim=1))
    set_to(linear[0].bias, ours.first.user.bias)
    copy_rest(ours.rest, linear[1:])
    user, history, item = ids(N, 2), ids(N, LENGTH, 2), ids(N, 2)
    given = {name: user[:, at] for at, name in enumerate(profile)}
    given |= {name: item[:, at] for at, name in enumerate(pair)}
    given |= {f"hist_{name}": history[:, :, at] for at, name in enumerate(pair)}
    with torch.no_grad():
        wanted = theirs(given)
        found = ours(user, history, torch.ones(N, LENGTH, dtype=torch.bool), item)
    torch.testing.assert_close(torch.sigmoid(found), wanted, **CLOSE)
    assert found.std() > 0.02


def test_bst_takes_nothing_from_what_is_not_there() -> None:
    ours = BST(BSTConfig(rows=ROWS, dim=8, heads=2, behaviours=LENGTH, hidden=(9, 7, 5)))
    valid = torch.arange(LENGTH)[None] < 3
    history, item, user = ids(1, LENGTH, 2), ids(N, 2), ids(1, 4)
    other = torch.where(valid[:, :, None], history, ids(1, LENGTH, 2))
    with torch.no_grad():
        assert torch.equal(ours(user, history, valid, item), ours(user, other, valid, item))
        assert not torch.equal(ours(user, history, ~valid, item), ours(user, other, ~valid, item))
        assert ours(user, history, torch.zeros_like(valid), item).isfinite().all()


def test_dlrm_is_its_papers_sums() -> None:
    ours = DLRM(DLRMConfig(user_tables=2, item_tables=2, rows=ROWS, dim=4, lookups=3, dense=2, bottom=(6,), top=(7,)))
    dense, user_ids, item_ids = torch.randn(N, 2), ids(N, 2, 3), ids(N, 2, 3)
    tables = tables_of(ours.user) + tables_of(ours.item)
    with torch.no_grad():
        found = ours(dense, user_ids, item_ids)
        for row in range(N):
            x = torch.relu(ours.bottom.layers[0](torch.relu(ours.below(dense[row]))))
            looked_up = [*user_ids[row], *item_ids[row]]
            vectors = [x, *(table[some].sum(0) for table, some in zip(tables, looked_up, strict=True))]
            pairs = [vectors[a] @ vectors[b] for a, b in itertools.product(range(5), repeat=2) if b < a]
            z = ours.above(torch.cat([x, torch.stack(pairs)]))
            torch.testing.assert_close(found[row], ours.top.layers[0](torch.relu(z))[0], **CLOSE)
    assert found.std() > 0.02


@pytest.mark.parametrize("name", ["wnd", "din", "dlrm", "bst"])
def test_one_user_for_all_candidates_is_that_user_for_each(name: str) -> None:
    made: dict[str, tuple[nn.Module, list[Tensor], Tensor]] = {
        "wnd": (WideAndDeep(WideAndDeepConfig(rows=ROWS)), [ids(1, 18), torch.randn(1, 13)], ids(N, 9)),
        "din": (DIN(DINConfig(rows=ROWS)), [ids(1, 4), ids(1, LENGTH, 2), torch.rand(1, LENGTH) > 0.3], ids(N, 2)),
        "dlrm": (DLRM(DLRMConfig(rows=ROWS)), [torch.randn(1, 13), ids(1, 6, 80)], ids(N, 2, 80)),
        "bst": (BST(BSTConfig(rows=ROWS)), [ids(1, 4), ids(1, 20, 2), torch.rand(1, 20) > 0.3], ids(N, 2)),
    }
    model, user, items = made[name]
    each = [one.expand(N, *one.shape[1:]) for one in user]
    with torch.no_grad():
        torch.testing.assert_close(model(*user, items), model(*each, items), **CLOSE)
