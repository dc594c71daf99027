"""The symmetric product, by the interpreted kernel and by torch, against float64."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_muonclip.kernels import symmetric_matmul as module
from lightning_muonclip.kernels.costs import COSTS
from lightning_muonclip.kernels.symmetric_matmul import symmetric_cost, symmetric_matmul

Product = Callable[..., Tensor]

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
SIZES = st.sampled_from([1, 2, 7, 16, 33, 63, 64, 65, 130])
FACTORS = st.sampled_from([0.0, 1.0, -0.75, 2.5])


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def symmetric(x: Tensor) -> Tensor:
    return x.tril() + x.tril(-1).mT


def in_float64(
    a: Tensor, b: Any = None, *, alpha: Any = 1.0, beta: Any = 0.0, c: Any = None, gamma: Any = 0.0
) -> Tensor:
    alpha, beta, gamma = (torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1, 1) for x in (alpha, beta, gamma))
    product = alpha * (a.double() @ (a if b is None else b).double().mT)
    identity = torch.eye(a.shape[1], dtype=torch.float64, device=a.device)
    return symmetric(product + (0 if c is None else beta * c.double()) + gamma * identity)


def terms(a: Tensor, b: Tensor | None = None, **options: Any) -> Tensor:
    """The same product of absolute values, which bounds every partial sum."""
    return in_float64(a.abs(), None if b is None else b.abs(), **{name: abs(x) for name, x in options.items()})


def _call(
    function: Product, a: Tensor, b: Any = None, *, alpha: Any = 1.0, beta: Any = 0.0, c: Any = None, gamma: Any = 0.0
):
    (x, xs), (y, ys), (z, zs) = (module._split(factor) for factor in (alpha, beta, gamma))
    return function(a, a if b is None else b, c, x, y, z, xs, ys, zs)


@pytest.fixture(scope="module")
def triton_module(triton_runs: None) -> Iterator[Any]:
    """A separate, interpreted copy of the kernel, since Triton reads its environment variable when it decorates.

    Triton itself and the library's copy of the kernel, which may have been imported before, are not affected.
    """
    from triton.runtime import interpreter

    path = Path(module.__file__).with_name("symmetric_matmul_triton.py")
    spec = importlib.util.spec_from_file_location("interpreted_symmetric_matmul", path)
    interpreted = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(interpreted)
    with pytest.MonkeyPatch.context() as patch:
        # The interpreter stores bfloat16 as raw bits and would multiply those.
        dot = interpreter.InterpreterBuilder.create_dot

        def exact_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
            return dot(self, *(_float32(x) for x in (a, b)), *others)

        patch.setattr(interpreter.InterpreterBuilder, "create_dot", exact_dot)
        yield interpreted


def _float32(x: Any) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)


@pytest.fixture(scope="module")
def kernel(triton_module: Any) -> Product:
    return lambda a, b=None, **options: _call(triton_module.launch, a, b, **options)


ALWAYS_PANELS = COSTS["none"]._replace(panels_from=dict.fromkeys(COSTS["none"].panels_from, 1))


@pytest.fixture(params=["kernel", "torch", "panels"])
def product(request: Any, monkeypatch: pytest.MonkeyPatch) -> Product:
    if request.param == "kernel":
        return request.getfixturevalue("kernel")
    if request.param == "panels":
        monkeypatch.setattr(module, "cpu_costs", lambda: ALWAYS_PANELS)
    return symmetric_matmul


@st.composite
def strided(draw: Any, batch: int, n: int, k: int, dtype: torch.dtype, make: Product = normal) -> Tensor:
    """A batch of matrices with any strides."""
    seed = draw(st.integers(0, 2**20))
    way = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "apart"]))
    if way == "transposed":
        return make((batch, k, n), seed, dtype=dtype).mT
    if way == "sliced":
        return make((batch, n + 3, 2 * k + 1), seed, dtype=dtype)[:, 2 : n + 2, 1::2]
    if way == "expanded":
        return make((1, n, k), seed, dtype=dtype).expand(batch, n, k)
    if way == "apart":
        return make((n, batch, k), seed, dtype=dtype).transpose(0, 1)
    return make((batch, n, k), seed, dtype=dtype)


@st.composite
def problems(draw: Any, dtype: torch.dtype, make: Product = normal) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    batch, n, k = draw(st.integers(1, 3)), draw(SIZES), draw(SIZES)
    a = draw(strided(batch, n, k, dtype, make))
    options: dict[str, Any] = {}
    for i, name in enumerate(("alpha", "beta", "gamma")):
        options[name] = draw(FACTORS)
        if draw(st.booleans()):
            options[name] = make((batch,), 100 + i, dtype=torch.float32)
    if draw(st.booleans()):
        options["c"] = symmetric(draw(strided(batch, n, n, dtype, make)))
    return a, None, options


def check(product: Product, a: Tensor, b: Tensor | None, options: dict[str, Any]) -> None:
    """Close to float64, with sums in float32: the kernel rounds once, torch may round each of its terms."""
    found = product(a, b, **options)
    assert found.dtype is a.dtype
    unit, expected, largest = torch.finfo(a.dtype).eps / 2, in_float64(a, b, **options), terms(a, b, **options)
    rounding = 4 * unit * largest if product is symmetric_matmul else 2 * unit * expected.abs()
    bound = rounding + 2**-24 * (a.shape[-1] + 4) * largest + torch.finfo(a.dtype).tiny
    assert bool(((found.double() - expected).abs() <= bound).all())
    if product is not symmetric_matmul or (symmetric_cost(a) < 1 and a.dtype is not torch.bfloat16):
        assert torch.equal(found, found.mT)


HYPOTHESIS = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@HYPOTHESIS
@given(st.data())
def test_close_to_float64(product: Product, dtype: torch.dtype, data: Any) -> None:
    check(product, *data.draw(problems(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@HYPOTHESIS
@given(st.data())
def test_integers_are_exact(product: Product, dtype: torch.dtype, data: Any) -> None:
    a, b, options = data.draw(problems(dtype, integers))
    if dtype in HALVES:
        a = a[..., :20]  # so that every sum is an integer that even bfloat16 holds
    options.update({name: torch.as_tensor(options[name]).round() for name in ("alpha", "beta", "gamma")})
    options.update({name: x if x.ndim else float(x) for name, x in options.items() if name != "c"})
    if terms(a, b, **options).max() <= 256:
        assert torch.equal(product(a, b, **options).double(), in_float64(a, b, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(7, 33), (130, 65), (64, 256), (200, 64)])
def test_the_kernel_is_as_accurate_as_torch(kernel: Product, n: int, k: int, dtype: torch.dtype) -> None:
    a, c = normal((2, n, k), dtype=dtype), symmetric(normal((2, n, n), 1, dtype=dtype))
    options = {"alpha": torch.tensor([0.7, -1.3]), "beta": -0.6, "c": c, "gamma": 0.3}
    expected = in_float64(a, **options)
    ours, theirs = ((f(a, **options).double() - expected).abs().max() for f in (kernel, symmetric_matmul))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [5, 130])
def test_two_polynomials_of_one_matrix(product: Product, n: int, dtype: torch.dtype) -> None:
    gram = symmetric_matmul(normal((2, n, 2 * n)), alpha=1 / n)
    left, right = (symmetric(x).to(dtype) for x in (gram @ gram - gram, 2 * gram + torch.eye(n)))
    check(product, left, right, {"alpha": 0.5})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("panels", [1, 3, 4, 50])
def test_panels_change_nothing_but_the_work(dtype: torch.dtype, panels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a = integers((2, 150, 20), 0, dtype)
    c = symmetric(integers((2, 150, 150), 1, dtype))
    options: dict[str, Any] = {"alpha": 2.0, "beta": -1.0, "c": c, "gamma": 3.0}
    monkeypatch.setattr(module, "cpu_costs", lambda: ALWAYS_PANELS)
    monkeypatch.setattr(module, "PANELS", panels)
    for left in (a, a.mT.contiguous().mT):
        assert torch.equal(symmetric_matmul(left, **options).double(), in_float64(a, **options))
        assert torch.equal(symmetric_matmul(left, gamma=3.0).double(), in_float64(a, gamma=3.0))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_factor_of_zero_leaves_the_other_terms(product: Product, dtype: torch.dtype) -> None:
    if dtype is torch.float64 and product is not symmetric_matmul:
        pytest.skip("the kernel has no float64")
    a, c = integers((2, 33, 7), 0, dtype), symmetric(integers((2, 33, 33), 1, dtype))
    options: dict[str, Any] = {"alpha": 0.0, "beta": -0.5, "c": c, "gamma": 1.0}
    assert torch.equal(product(a, **options).double(), in_float64(a, **options))


def test_float64_is_summed_in_float64() -> None:
    a = normal((2, 300, 40), dtype=torch.float64)
    torch.testing.assert_close(symmetric_matmul(a, alpha=0.3), in_float64(a, alpha=0.3), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uninitialized_memory_and_an_unused_addend_do_not_leak(product: Product, dtype: torch.dtype) -> None:
    a, nan = normal((2, 70, 9), dtype=dtype), torch.full((2, 70, 70), torch.nan, dtype=dtype)
    expected = product(a)
    assert torch.equal(product(a, c=nan if product is symmetric_matmul else None), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("n", [3, 130])
def test_a_nan_stays_in_its_matrix(product: Product, n: int) -> None:
    a = normal((3, n, 8))
    a[1, 2, 3] = torch.nan
    found = product(a)
    assert found[1, 2].isnan().all() and found[1, :, 2].isnan().all()
    assert found[[0, 2]].isfinite().all() and found[1, :2, :2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(product: Product, shape: tuple[int, int, int]) -> None:
    assert torch.equal(product(torch.empty(shape), gamma=2.0), 2 * torch.eye(shape[1]).expand(shape[0], -1, -1))


def _write_tiles(out, tiles, GROUP):  # noqa: N803
    row, column = tile_of(tl.program_id(0), tiles, GROUP)  # noqa: F821
    tl.store(out + 2 * tl.program_id(0), row)  # noqa: F821
    tl.store(out + 2 * tl.program_id(0) + 1, column)  # noqa: F821


def test_every_tile_of_the_triangle_once_and_neighbors_together(
    triton_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setitem(globals(), "tl", triton_module.tl)
    monkeypatch.setitem(globals(), "tile_of", triton_module._tile_of)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    write = triton.jit(_write_tiles)
    for tiles in (1, 7, 9, 18):
        found = torch.zeros(tiles * (tiles + 1) // 2, 2, dtype=torch.int32)
        write[(len(found),)](found, tiles, GROUP=8)
        pairs = [tuple(pair) for pair in found.tolist()]
        assert sorted(pairs) == [(i, j) for i in range(tiles) for j in range(i + 1)]
        assert all(i // 8 <= other // 8 for (i, _), (other, _) in pairwise(pairs))


def test_offsets_pass_two_to_the_31(kernel: Product, tmp_path: Path) -> None:
    """Uses a sparse file, which takes only the disk space of what is written."""
    apart, n, k = 2**31 + 40, 5, 3
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * (apart + apart // 2 + n * k))
    far = torch.from_file(str(path), shared=True, size=apart + apart // 2 + n * k)
    for strides in ((apart, k, 1), (1, apart // 4, 16), (16, 1, apart // 2)):
        a = far.as_strided((2, n, k), strides)
        values = integers((2, n, k), 3, torch.float32)
        a.copy_(values)
        assert torch.equal(kernel(a), in_float64(values).float())


def test_autocast_changes_nothing() -> None:
    a = normal((2, 65, 16))
    outside = symmetric_matmul(a, gamma=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(symmetric_matmul(a, gamma=1.0), outside)


def test_keeps_no_graph_and_changes_no_input() -> None:
    a, c = normal((1, 5, 4)).requires_grad_(), symmetric(normal((1, 5, 5)))
    before = a.detach().clone(), c.clone()
    assert not symmetric_matmul(a, c=c, beta=2.0, gamma=1.0).requires_grad
    assert torch.equal(a, before[0]) and torch.equal(c, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.5, torch.tensor([0.5, 2.0])], ids=["number", "tensor"])
def test_is_an_operation_that_torch_can_compile(dtype: torch.dtype, alpha: Any) -> None:
    a, c = normal((2, 6, 4), dtype=dtype), symmetric(normal((2, 6, 6), 1, dtype=dtype))
    arguments = (a, None, c, 1.0, 2.0, 0.0, alpha if isinstance(alpha, Tensor) else None, None, None)
    torch.library.opcheck(torch.ops.muonclip.symmetric_matmul.default, arguments)

    def step(a: Tensor) -> Tensor:
        gram = symmetric_matmul(a.mT, alpha=alpha, gamma=0.1)
        return symmetric_matmul(gram, gram, beta=2.0, c=gram) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a), step(a))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": torch.ones(3, 4)}, "needs a batch of real floating-point matrices"),
        ({"a": torch.ones(1, 3, 4, dtype=torch.int32)}, "needs a batch of real floating-point matrices"),
        ({"a": torch.ones(1, 3, 4), "b": torch.ones(1, 4, 3)}, r"needs b to be torch.float32 of shape \(1, 3, 4\)"),
        ({"a": torch.ones(1, 3, 4), "c": torch.ones(1, 3, 3).double()}, "got torch.float64"),
        ({"a": torch.ones(2, 3, 4), "alpha": torch.ones(3)}, r"must have shape \(2,\) and be on cpu, got shape \(3,\)"),
    ],
)
def test_mismatched_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        symmetric_matmul(**arguments)


def test_work_is_saved_on_large_matrices() -> None:
    assert symmetric_cost(torch.empty(1, 64, 64)) == 1
    assert symmetric_cost(torch.empty(1, 4096, 1)) < 1


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 17, 64, 127, 129, 512, 1000, 1024, 2048, 4096])
def test_on_the_device(n: int, dtype: torch.dtype) -> None:
    for batch, k, seed in ((1, n, 0), (2, n + 1, 1), (2, 4 * math.ceil(n / 8), 2)):
        a = (normal((batch, n, k), seed) / k**0.5).to("cuda", dtype)
        c = symmetric(normal((batch, n, n), 3)).to("cuda", dtype)
        factors = torch.linspace(0.5, 1.5, batch, device="cuda")
        for left in (a, a.mT.contiguous().mT):
            options = {"alpha": factors, "beta": -0.5, "c": c, "gamma": 0.25}
            check(symmetric_matmul, left, None, options, torch.finfo(dtype).eps / 2)


@gpu
def test_float32_is_not_tf32() -> None:
    a = (1 + 2.0**-20 * normal((1, 256, 256))).cuda()
    found, expected = symmetric_matmul(a).double(), in_float64(a)
    assert ((found - expected).abs() <= 1e-5 * expected.abs()).all()


@gpu
@pytest.mark.parametrize("n", [32, 256])
def test_no_synchronization_and_capturable(n: int) -> None:
    a = normal((3, n, 64)).cuda().bfloat16()
    alpha, c = torch.ones(3, device="cuda"), torch.zeros(3, n, n, device="cuda", dtype=a.dtype)

    def run() -> Tensor:
        return symmetric_matmul(a, alpha=alpha, beta=alpha, c=c, gamma=0.5)

    run()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    alpha.fill_(2.0)
    c.fill_(1.0)
    graph.replay()
    assert torch.equal(found, run())


@gpu
def test_a_batch_of_more_than_two_to_the_31_elements() -> None:
    n = 1024
    batch = 2**31 // n**2 + 2
    if torch.cuda.mem_get_info()[0] < 3 * 2 * batch * n**2:
        pytest.skip("needs 13 GB of device memory")
    a = torch.zeros(batch, n, n, device="cuda", dtype=torch.bfloat16)
    a[-1] = integers((n, n), 0, a.dtype).cuda() * (torch.arange(n, device="cuda") < 60)
    found = symmetric_matmul(a)
    assert torch.equal(found[-1].double(), in_float64(a[-1:])[0]) and not found[:-1].any()
