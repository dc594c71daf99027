"""AttentionMask: which keys each query may see."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_muonclip.attention.blocks import BLOCK, band, clamped, filled
from lightning_muonclip.attention.compiled import fast
from lightning_muonclip.attention.mask_mods import (
    MaskMod,
    boolean,
    causal_after,
    indices,
    near,
    real,
    same_document,
    visible_in_all,
    visible_in_any,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

T = TypeVar("T")


class AttentionMask:
    """An attention mask: a pair is visible if every given condition allows it.

    Masks combine with ``&`` and ``|``. Create one mask per batch and pass it to every layer: whatever a backend needs (a
    dense mask, a BlockMask, or just causality) is built once. Later changes of its tensors have no effect. In a compiled
    model, every layer would build its own BlockMask of padding or documents; call :meth:`block_mask` beforehand to avoid
    that.

    A query that sees nothing gets an output of zeros and no gradient.

    Args:
        causal: A query sees no later key.
        padding: Boolean, shape ``(batch, length)``; ``True`` is a real token. Padded keys are hidden from every query.
            Padded queries attend, but do not count for QK-Clip.
        window: A query sees only keys less than this many tokens away. ``None`` means any distance.
        documents: Integer document ids of shape ``(batch, length)``. A token sees only its own document. A negative id
            marks padding, which sees nothing and is hidden from everything.
        prefix: Integers, shape ``(batch,)``: this many leading tokens of a sequence are visible to all of its queries
            despite causality (prefix-LM).
        mask_mod: Any other condition, as a function of the indices of batch, head, query and key, for tensors that
            broadcast.
        either: Groups of alternatives, made by ``|``: a pair must be visible in at least one mask of each group.

    Raises:
        ValueError: If ``padding`` is not a boolean matrix, if ``documents`` or ``prefix`` are not integers of the stated
            shape, if the window is empty, or if a prefix is given without causality.

    Example:
        >>> keep = torch.tensor([[True, True, False]])
        >>> AttentionMask(causal=False, padding=keep).dense(3)[0, 0, 0]
        tensor([ True,  True, False])
        >>> first_two = AttentionMask(mask_mod=lambda b, h, q, k: k < 2)
        >>> (AttentionMask(window=2) | first_two).dense(5)[0, 0].int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 0, 1, 1]], dtype=torch.int32)
    """

    def __init__(
        self,
        causal: bool = True,
        padding: Tensor | None = None,
        window: int | None = None,
        documents: Tensor | None = None,
        prefix: Tensor | None = None,
        mask_mod: MaskMod | None = None,
        either: tuple[tuple[AttentionMask, ...], ...] = (),
    ) -> None:
        if not isinstance(causal, bool):
            raise ValueError(
                f"causal must be True or False, got {_describe(causal)}; pass masks by keyword, such as padding=..."
            )
        if padding is not None and not (_is_tensor(padding, 2) and padding.dtype is torch.bool):
            raise ValueError(
                f"padding must be boolean of shape (batch, length), True for real tokens; got {_describe(padding)}"
            )
        if window is not None and (not isinstance(window, (int, torch.SymInt)) or window < 1):
            raise ValueError(f"window must be an integer of at least 1, got {window!r}; use None for any distance")
        if documents is not None and not _is_integers(documents, 2):
            raise ValueError(
                f"documents must be integers of shape (batch, length), one id per token; got {_describe(documents)}"
            )
        if prefix is not None and not _is_integers(prefix, 1):
            raise ValueError(
                f"prefix must be integers of shape (batch,), one length per sequence; got {_describe(prefix)}"
            )
        if prefix is not None and not causal:
            raise ValueError("prefix needs causal=True; without causality every token sees the prefix anyway")
        # Not a dataclass: Lightning and torch take dataclasses apart to cast their fields.
        self.causal = causal
        self.padding = padding
        self.window = window
        self.documents = documents
        self.prefix = prefix
        self.mask_mod = mask_mod
        self.either = either
        self._derived: dict[tuple[str, int], AttentionMask] = {}
        self._built: dict[Any, tuple[Any, Any]] = {}

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """Visible in both."""
        mods = [mask.mask_mod for mask in (self, other) if mask.mask_mod is not None]
        own: dict[str, Tensor | None] = {}
        either = self.either + other.either
        for name, join in (("padding", torch.logical_and), ("documents", None), ("prefix", torch.minimum)):
            one, two = getattr(self, name), getattr(other, name)
            if name == "prefix" and self.causal and other.causal and (one is None or two is None):
                own[name] = None  # plain causality is stricter
            elif one is None or two is None or one is two:
                own[name] = two if one is None else one
            elif join is not None and one.shape == two.shape:
                own[name] = join(one, two)
            else:
                own[name] = one
                either += ((AttentionMask(causal=name == "prefix", **{name: two}),),)
        return AttentionMask(
            self.causal or other.causal,
            window=other.window if self.window is None else min(self.window, other.window or self.window),
            mask_mod=visible_in_all(mods) if mods else None,
            either=either,
            **own,
        )

    def __or__(self, other: AttentionMask) -> AttentionMask:
        """Visible in at least one."""
        # Shared conditions stay outside of the union, where backends can exploit them.
        both = [name for name in ("padding", "documents") if getattr(self, name) is getattr(other, name)]
        both += ["window"] * (self.window == other.window)
        shared: dict[str, Any] = {name: getattr(self, name) for name in both}
        rest: dict[str, Any] = dict.fromkeys(both)
        shared["causal"] = self.causal and other.causal and self.prefix is other.prefix
        if shared["causal"]:
            shared["prefix"] = self.prefix
            rest |= {"causal": False, "prefix": None}
        alternatives = self._but(**rest), other._but(**rest)
        is_all = any(mask._mod() is None for mask in alternatives)
        return AttentionMask(**shared, either=() if is_all else (alternatives,))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}, "_built": {}}

    def to(self, device: torch.device | str) -> AttentionMask:
        """A copy with its tensors on a device. Tensors that a ``mask_mod`` refers to stay where they are."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return self._but(**moved, either=self._each(lambda mask: mask.to(device)))

    def within(self, window: int) -> AttentionMask:
        """This mask limited to a window. Repeated calls return the same object, so that layers share what is built."""
        return self._derive(("window", window), lambda: self & AttentionMask(causal=False, window=window))

    def from_head(self, first: int) -> AttentionMask:
        """This mask for heads counted from ``first``, as on a rank of tensor parallelism."""
        return self._derive(("head", first), lambda: self._from_head(first)) if first else self

    def _from_head(self, first: int) -> AttentionMask:
        mod = self.mask_mod
        shifted = None if mod is None else lambda b, h, q, k: mod(b, h + first, q, k)
        return self._but(mask_mod=shifted, either=self._each(lambda mask: mask._from_head(first)))

    def dense(
        self,
        length: int,
        device: torch.device | None = None,
        *,
        batch: int | None = None,
        heads: int = 1,
        counted: bool = False,
    ) -> Tensor | None:
        """The boolean mask, or ``None`` if causality is the only condition.

        Args:
            length: Number of tokens per sequence.
            device: Device of the sequences. Defaults to that of the mask's tensors.
            batch: Number of sequences. Defaults to that of the padding, documents or prefix, else 1.
            heads: Number of query heads.
            counted: Include only pairs that count for QK-Clip, which excludes padded queries.

        Returns:
            Tensor of shape ``(batch or 1, heads or 1, length or 1, length)``; 1 where a dimension broadcasts.

        Raises:
            ValueError: If the padding, documents or prefix are for another length or batch, or on another device, or if a
                ``mask_mod`` does not return booleans.
        """
        batch, device = self._checked(length, device, batch)
        window = None if self.window is None or self.window >= length else self.window
        if window is None and not self._tensors() and self.mask_mod is None and not self.either:
            return None
        mask = self._but(window=window)
        counted = counted and self._has_padding()
        key = length, batch, heads, device
        return self._once(("dense", counted), key, lambda: mask._visible(counted, batch, heads, length, device))

    def block_mask(
        self, length: int, device: torch.device | None = None, *, batch: int | None = None, heads: int = 1
    ) -> BlockMask | None:
        """The BlockMask for sequences padded to a multiple of 128, or ``None`` if it hides nothing.

        Arguments and errors are those of :meth:`dense`.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        batch, device = self._checked(length, device, batch)
        mod = self._mod()
        whole = filled(length)
        if mod is None and whole == length:
            return None

        def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            # Padding tokens are hidden; clamping keeps functions that index a table within its bounds.
            return (k < length) if mod is None else mod(b, h, *clamped(q, k, length)) & (k < length)

        chosen = mod if mod is not None and whole == length else inside

        if not self._tensors() and self.mask_mod is None and not self.either:
            return self._once("band", (length, device), lambda: band(self.causal, self.window, length, device, chosen))

        def build() -> BlockMask:
            alike = boolean(chosen(*indices(batch, heads, 1, device))).shape  # 1 where sequences or heads broadcast
            rows, columns = (None if size == 1 else size for size in ((1,) * 4 + alike)[-4:-2])
            # Compiled, a GPU does not materialize the dense mask.
            create = fast(create_block_mask) if device.type == "cuda" else create_block_mask
            return create(chosen, rows, columns, whole, whole, str(device), BLOCK)

        return self._once("block", (length, batch, heads, device), build)

    def tiles(self, length: int, device: torch.device | None, *, batch: int, heads: int) -> dict[str, Any]:
        """The pairs that count, as arguments of :func:`~lightning_muonclip.kernels.max_logits.max_logits`.

        Causality, the window and documents are passed as such, because they let the kernel skip tiles; only the remaining
        conditions become a dense mask.
        """
        batch, device = self._checked(length, device, batch)
        rest = None
        if self.prefix is not None or self.mask_mod is not None or self.either:
            mask = self._but(causal=self.prefix is not None, padding=None, window=None, documents=None)
            key = length, batch, heads, device
            rest = self._once("rest", key, lambda: mask._visible(True, batch, heads, length, device))
        return {
            "is_causal": self.causal and self.prefix is None,
            "window": self.window,
            "documents": self._real_documents(),
            "mask": rest,
        }

    @property
    def pads_in_part(self) -> bool:
        """Whether a query may count for some keys only, because it is padding in one part of a ``|`` but not in another."""
        return any(mask.padding is not None for mask in self._parts() if mask is not self)

    def _real_documents(self) -> Tensor | None:
        """The document id of every token, negative for padding; ``None`` if there is only one document."""
        if self.padding is None:
            return self.documents
        one = torch.zeros_like(self.padding, dtype=torch.long) if self.documents is None else self.documents.long()
        return one.masked_fill(~self.padding, -1)

    def _has_padding(self) -> bool:
        return any(mask.padding is not None for mask in self._parts())

    def _visible(self, counted: bool, batch: int, heads: int, length: int, device: torch.device | None) -> Tensor:
        mod = self._mod(counted)
        assert mod is not None
        return boolean(mod(*indices(batch, heads, length, device)))

    def _mod(self, counted: bool = False) -> MaskMod | None:
        """The whole mask as one function; ``None`` if it hides nothing."""
        mods = list(self._mods(counted))
        return visible_in_all(mods) if mods else None

    def _mods(self, counted: bool) -> Iterator[MaskMod]:
        if self.prefix is not None:
            yield causal_after(self.prefix)
        elif self.causal:
            yield lambda b, h, q, k: k <= q
        if self.window is not None:
            yield near(self.window)
        if self.padding is not None:
            yield real(self.padding, counted)
        if self.documents is not None:
            yield same_document(self.documents)
        if self.mask_mod is not None:
            yield self.mask_mod
        for alternatives in self.either:
            mods = [mask._mod(counted) for mask in alternatives]
            yield visible_in_any([mod for mod in mods if mod is not None])

    def _each(self, change: Callable[[AttentionMask], AttentionMask]) -> tuple[tuple[AttentionMask, ...], ...]:
        return tuple(tuple(map(change, alternatives)) for alternatives in self.either)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"padding": self.padding, "documents": self.documents, "prefix": self.prefix}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _parts(self) -> Iterator[AttentionMask]:
        """This mask and, recursively, its alternatives."""
        yield self
        for alternatives in self.either:
            for mask in alternatives:
                yield from mask._parts()

    def _checked(self, length: int, device: torch.device | None, batch: int | None) -> tuple[int, torch.device]:
        """Checks the mask's tensors; returns batch and device, which default to those of the tensors."""
        given = [item for mask in self._parts() for item in mask._tensors().items()]
        if batch is None:
            batch = max((tensor.shape[0] for _, tensor in given), default=1)
        if device is None:
            device = next((tensor.device for _, tensor in given), torch.device("cpu"))
        for name, tensor in given:
            name += " are" if name == "documents" else " is"
            if tensor.ndim == 2 and tensor.shape[1] != length:
                raise ValueError(f"{name} for {tensor.shape[1]} tokens, but the sequence has {length}")
            if tensor.shape[0] not in (1, batch):
                raise ValueError(f"{name} for {tensor.shape[0]} sequences, but the batch has {batch}")
            if tensor.device != device:
                raise ValueError(
                    f"{name} on {tensor.device}, but the sequence is on {device}; move the mask with mask.to(...)"
                )
        return batch, device

    def _but(self, **changes: Any) -> AttentionMask:
        return AttentionMask(**{name: getattr(self, name) for name in _FIELDS} | changes)

    def _derive(self, key: tuple[str, int], make: Callable[[], AttentionMask]) -> AttentionMask:
        if torch.compiler.is_compiling():
            return make()
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def _once(self, kind: Any, key: Any, build: Callable[[], T]) -> T:
        """Builds a value once per batch and caches it for the other layers; keeps the last value of each kind."""
        made, value = self._built.get(kind, (None, None))
        if torch.compiler.is_compiling():
            # Tensors of a graph must not leave it. Of the cached values, only a BlockMask is worth a guard.
            return value if kind == "block" and made is not None and made[0] == key else build()
        now = key, torch.is_inference_mode_enabled()  # inference tensors cannot be used in training
        if made != now:
            value = build()
            # Fake tensors are not cached: estimators run models on them.
            if type(getattr(value, "kv_indices", value)) is Tensor:
                self._built[kind] = now, value
        return value


_FIELDS = tuple(inspect.signature(AttentionMask).parameters)

#: The default mask.
CAUSAL = AttentionMask()


def checked(mask: AttentionMask | None) -> AttentionMask:
    """The mask, or a causal one by default.

    Raises:
        ValueError: If it is not an AttentionMask.
    """
    if mask is None:
        return CAUSAL
    if not isinstance(mask, AttentionMask):
        raise ValueError(
            f"mask must be an AttentionMask, got {type(mask).__name__}; use AttentionMask(padding=keep), True for real"
            " tokens, or AttentionMask(causal=False, mask_mod=lambda b, h, q, k: visible[b, h, q, k])"
        )
    return mask


def _is_tensor(x: object, ndim: int) -> bool:
    return isinstance(x, Tensor) and x.ndim == ndim


def _is_integers(x: Tensor, ndim: int) -> bool:
    return _is_tensor(x, ndim) and not x.dtype.is_floating_point and x.dtype is not torch.bool


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
