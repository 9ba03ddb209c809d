"""Codes of vectors: the contract over the whole table, each member's equation written plainly in float64, and
the exact figures of BSQ."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit_ft.vector_codes import BSQ, FSQ, LFQ, VECTOR_CODES, VectorCode, vector_code

SMALL: dict[str, VectorCode] = {"bsq": BSQ(bits=6), "lfq": LFQ(bits=5), "fsq": FSQ(counts=(3, 4, 5, 8))}


def plain_bsq(h: Tensor) -> Tensor:
    u = h / h.square().sum(-1, keepdim=True).sqrt()
    return torch.where(u >= 0, 1.0, -1.0).double() / math.sqrt(h.shape[-1])


def plain_lfq(h: Tensor) -> Tensor:
    return torch.where(h >= 0, 1.0, -1.0).double()


def plain_fsq(h: Tensor) -> Tensor:
    columns = []
    for i, n in enumerate((3, 4, 5, 8)):
        reach, offset = (n - 1) * 0.999 / 2, 0.0 if n % 2 else 0.5
        bound = torch.tanh(h[:, i] + math.atanh(offset / reach)) * reach - offset
        columns.append(torch.round(bound) / (n // 2))
    return torch.stack(columns, -1)


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"bsq": plain_bsq, "lfq": plain_lfq, "fsq": plain_fsq}


def vectors(code: VectorCode, count: int = 400, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(
        count, code.width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def test_every_member_has_its_rows() -> None:
    assert VECTOR_CODES and set(VECTOR_CODES) == set(SMALL) == set(PLAIN)
    for name, kind in VECTOR_CODES.items():
        assert kind.name == name and isinstance(SMALL[name], kind)


@pytest.mark.parametrize("name", VECTOR_CODES)
def test_points_are_those_of_the_equation_and_ids_name_them(name: str) -> None:
    code = SMALL[name]
    h = vectors(code)
    points, ids = code.quantize(h)
    torch.testing.assert_close(points, PLAIN[name](h), rtol=1e-12, atol=1e-12)
    assert torch.equal(code.encode(h), ids) and torch.equal(code.decode(ids, torch.float64), points)
    every = torch.arange(code.size)
    assert torch.equal(code.ids_of(code.digits_of(every)), every) and code.id_bits == math.log2(code.size)
    table = code.decode(every, torch.float64)
    assert len(table.unique(dim=0)) == code.size, "no two ids are one point"
    assert 0.9 * code.size < len(code.encode(vectors(code, 20_000)).unique()) <= code.size


@pytest.mark.parametrize("name", VECTOR_CODES)
def test_the_gradient_goes_straight_through_to_the_place(name: str) -> None:
    code, h = SMALL[name], vectors(SMALL[name], 30).requires_grad_()
    weight = vectors(code, 30, seed=1)
    (found,) = torch.autograd.grad((code.quantize(h)[0] * weight).sum(), h)
    (wanted,) = torch.autograd.grad((code.scaled(code.place(h)) * weight).sum(), h)
    torch.testing.assert_close(found, wanted)
    assert found.abs().sum() > 0


@pytest.mark.parametrize("name", VECTOR_CODES)
def test_the_chances_factorise_the_softmax_over_all_codes(name: str) -> None:
    """p(c) ~ exp(-m |z - c|^2) over a table of all of them: chances, entropy of a vector, and the bound."""
    code = SMALL[name]
    h = vectors(code, 25)
    table = code.at(code.digits_of(torch.arange(code.size)), torch.float64)
    p = (-code.metric * (code.place(h)[:, None] - table).square().sum(-1)).softmax(-1)
    chances = [c.exp() for c in code.log_chances(h)]
    for number, digits in enumerate(itertools.islice(code.digits_of(torch.arange(code.size)), 0, None, 7)):
        product = torch.stack([chances[i][:, int(d)] for i, d in enumerate(digits)]).prod(0)
        torch.testing.assert_close(product, p[:, 7 * number], rtol=1e-9, atol=1e-15)
    found = code.entropy(h)
    torch.testing.assert_close(found.vector, torch.special.entr(p).sum(-1).mean())
    assert found.codebook >= torch.special.entr(p.mean(0)).sum() - 1e-9, (
        "independent coordinates are the most"
    )
    counted = torch.arange(25) % 3 > 0
    part, wanted = code.entropy(h.view(5, 5, -1), counted.view(5, 5)), code.entropy(h[counted])
    torch.testing.assert_close((part.vector, part.codebook), (wanted.vector, wanted.codebook))
    assert found.vector - 1e-12 <= found.codebook <= math.log(code.size) + 1e-9


@pytest.mark.parametrize("name", VECTOR_CODES)
def test_entropy_has_a_finite_gradient_wherever_a_vector_is(name: str) -> None:
    code = SMALL[name]
    h = torch.cat([vectors(code, 4).float(), torch.zeros(1, code.width), 1e4 * torch.ones(2, code.width)])
    h.requires_grad_()
    code.entropy(h).loss.backward()
    assert h.grad is not None and h.grad.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_ids_are_mixed_radix_numbers_lowest_first(data: st.DataObject) -> None:
    counts = tuple(data.draw(st.lists(st.integers(3, 9), min_size=1, max_size=12)))
    code = data.draw(st.sampled_from([FSQ(counts=counts), BSQ(bits=len(counts)), LFQ(bits=5 * len(counts))]))
    digits = [data.draw(st.integers(0, n - 1)) for n in code.levels]
    wanted = 0
    for digit, n in zip(reversed(digits), reversed(code.levels), strict=True):
        wanted = wanted * n + digit
    assert int(code.ids_of(torch.tensor(digits))) == wanted < code.size
    assert code.digits_of(torch.tensor([wanted]))[0].tolist() == digits
    again = vector_code(json.loads(json.dumps(code.to_json())))
    assert again == code and hash(again) == hash(code) and str(again) == str(code)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_bsq_is_the_nearest_point_of_the_sphere_and_near(bits: int, seed: int, size: float) -> None:
    code = BSQ(bits=bits)
    h = size * torch.randn(8, bits, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u, (point, ids) = h / h.norm(dim=-1, keepdim=True), code.quantize(h)
    torch.testing.assert_close(point.norm(dim=-1), torch.ones(8, dtype=torch.float64))
    off = (u - point).norm(dim=-1)
    assert (off <= math.sqrt(2 - 2 / math.sqrt(bits)) + 1e-9).all()
    other = code.decode(ids ^ (1 << seed % bits), torch.float64)  # one bit turned over
    assert ((u - other).norm(dim=-1) >= off - 1e-9).all()
    assert torch.equal(code.encode(3.5 * h), ids), "length says nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ids_of_many_levels_are_codes_in_16_bits_too(dtype: torch.dtype) -> None:
    code = FSQ(counts=(1000, 300, 5))
    points, ids = code.quantize((20 * vectors(code)).to(dtype))
    assert torch.equal(code.decode(ids, dtype), points)


def test_bsq_has_the_figures_of_its_paper() -> None:
    """At L = 14 and vectors all over the sphere."""
    code, h = BSQ(bits=14), torch.randn(100_000, 14, generator=torch.Generator().manual_seed(0))
    u, (point, ids) = code.place(h), code.quantize(h)
    assert (u - point).norm(dim=-1).mean().item() == pytest.approx(0.6068, abs=5e-4)
    corner = torch.zeros(1, 14).index_fill_(1, torch.tensor([3]), 1.0)  # as far from all points as can be
    assert (corner - code.quantize(corner)[0]).norm().item() == pytest.approx(
        math.sqrt(2 - 2 / math.sqrt(14))
    )
    assert math.sqrt(2 - 2 / math.sqrt(14)) == pytest.approx(1.211, abs=5e-4)
    found = code.entropy(h)
    assert found.vector.item() == pytest.approx(9.565, abs=2e-3)
    assert found.codebook.item() == pytest.approx(14 * math.log(2), abs=1e-3)
    assert found.loss.item() == pytest.approx(-0.139, abs=2e-3)
    p = torch.stack(code.log_chances(h[:50]), 1)[..., 1].exp()
    torch.testing.assert_close(p, torch.sigmoid(4 * u[:50] / math.sqrt(14)))
    assert int(code.encode(torch.zeros(14))) == 2**14 - 1, "sign(0) is +1"
    assert torch.equal((ids[:, None] >> torch.arange(14) & 1).bool(), u >= 0), "bit i is coordinate i"


def test_a_training_step_moves_vectors_to_unused_codes() -> None:
    """All vectors on one code: the entropy term spreads them."""
    h = (1 + 0.1 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    code, optimizer = BSQ(bits=8), torch.optim.Adam([h], 0.05)
    assert len(code.encode(h).unique()) == 1
    for _ in range(60):
        optimizer.zero_grad()
        code.entropy(h).loss.backward()
        optimizer.step()
    assert len(code.encode(h).unique()) > 16


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: vector_code({"kind": "vq"}), "code: got kind 'vq'; allowed are bsq, lfq, fsq"),
        (lambda: vector_code({"kind": ["bsq"]}), r"code: got kind .'bsq'.; allowed are bsq, lfq, fsq"),
        (lambda: vector_code([1]), "code: got .1.; needs a kind"),  # pyright: ignore[reportArgumentType]
        (lambda: vector_code({"kind": "bsq", "levels": 3}), "code bsq: .*levels"),
        (lambda: BSQ(bits=0), "bits: got 0; allowed are 1 to 62"),
        (lambda: LFQ(bits=True), "bits: got True"),
        (lambda: FSQ(counts=(8, 2)), "counts: got .8, 2.; needs a list of levels"),
        (lambda: FSQ(counts=()), "counts: got"),
        (lambda: FSQ(counts=(65536,) * 4), r"at most 2\^62 codes"),
        (lambda: BSQ().decode(torch.tensor([3, 1 << 14])), "codes: got 16384; bsq of 14 bits has 0 to 16383"),
        (lambda: BSQ().decode(torch.tensor([-1])), "codes: got -1"),
        (lambda: BSQ().decode(torch.tensor([0.5])), "codes: got float32; they are integers"),
        (lambda: BSQ().encode(torch.zeros(3, 13)), r"shape \[3, 13\]; needs .* last dimension is 14"),
        (lambda: BSQ().encode(torch.zeros(3, 14).long()), "got a int64 tensor"),
        (lambda: BSQ().entropy(torch.zeros(0, 14)), "entropy: got no vector"),
    ],
)
def test_what_cannot_be_is_said(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
