"""Secure aggregation: the center gets sums over clients, by Flower's SecAgg+ (Bell et al. 2020; flwr 1.42).

Each client adds masks to its integers that cancel in the sum, so that one client's message alone says nothing; shares
of the masks' seeds let the sum be had also when clients drop out on the way. Three things are to be known of it:

- Flower makes masks from 256-bit seeds folded to 32 bits, which a center could try out one by one. Here masks come from
  the whole seed, by AES in counter mode (`strong_masks`); protocol and key exchange are Flower's.
- The center hands clients each other's public keys. One that hands out its own instead hears everything: this protects
  from a center that looks, not from one that forges.
- With two clients, each knows the other's part from the sum. Three is the least that is taken.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from mixofshow.errors import BadInputError
from mixofshow.federation.fixed import LEVELS, MAX_CLIENTS

LEAST: Final = 3
MODULUS: Final = 2**32
RECORD, MASKED = "secaggplus_configs", "masked_params"
"""Where Flower has masked numbers in a reply (flwr 1.42, `secaggplus_constants`)."""
PIECES: Final = "masked"
"""Where they travel: a content has each name once, whatever kind of record."""
MASKING: Final = (
    "flwr.client.mod.secure_aggregation.secaggplus_mod",
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow",
)
"""Flower's modules that make masks, at a client and at the center."""


def masks(seed: bytes, modulus: int, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Masks of these shapes, whole numbers in [0, modulus), a power of two up to 2³², by AES-256 in counter mode."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    digest = hashes.Hash(hashes.SHA256())
    digest.update(b"mixofshow mask" + seed)
    stream = Cipher(algorithms.AES(digest.finalize()), modes.CTR(bytes(16))).encryptor()
    made = []
    for shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        numbers = np.frombuffer(stream.update(bytes(4 * count)), dtype="<u4").astype(np.int64)
        made.append((numbers & (modulus - 1)).reshape(shape))
    return made


@contextlib.contextmanager
def strong_masks() -> Iterator[None]:
    """Inside, Flower's secure aggregation makes its masks by `masks`; both sides must."""
    import importlib

    modules: list[Any] = [importlib.import_module(name) for name in MASKING]
    kept = [module.pseudo_rand_gen for module in modules]
    try:
        for module in modules:
            module.pseudo_rand_gen = masks
        yield
    finally:
        for module, before in zip(modules, kept, strict=True):
            module.pseudo_rand_gen = before


def masked(message: Any, context: Any, terms: Any) -> Any:
    """A client's answer to any step of the protocol; `terms(message)` gives its limbs, when they are to be summed."""
    from flwr.client.mod import secaggplus_mod
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.compat.common import recorddict_compat

    def fit(asked: Any, _: Any) -> Any:
        from flwr.app import Message

        arrays = ndarrays_to_parameters([limb.numpy() for limb in terms(asked)])
        content = recorddict_compat.fitres_to_recorddict(FitRes(Status(Code.OK, ""), arrays, 1, {}), keep_input=False)
        return Message(content, reply_to=asked)

    with strong_masks():
        return _in_pieces(secaggplus_mod(message, context, fit))


def _in_pieces(reply: Any) -> Any:
    """A reply with its masked numbers as arrays of 32 bits, which Flower cuts into pieces: it sends them as one of 64."""
    from flwr.app import Array, ArrayRecord

    table = reply.content.config_records[RECORD]
    if MASKED not in table:
        return reply
    numbers = [np.load(io.BytesIO(data), allow_pickle=False).astype("<u4") for data in table[MASKED]]
    arrays = {f"{k:06d}": Array("uint32", one.shape, "bytes", one.tobytes()) for k, one in enumerate(numbers)}
    reply.content.array_records[PIECES] = ArrayRecord(arrays)
    del table[MASKED]
    return reply


def _whole_again(reply: Any) -> Any:
    """The reply as Flower's workflow wants it. Raises BadInputError for arrays of another size than they say."""
    from flwr.app import ConfigRecord

    arrays = None if reply.has_error() else reply.content.array_records.get(PIECES)
    if not arrays:
        return reply
    masked_numbers = []
    for one in arrays.values():
        found = np.frombuffer(one.data, "<u4").astype(np.int64)
        if found.size != int(np.prod(one.shape, dtype=np.int64)):
            raise BadInputError("masked numbers of another shape than they say")
        file = io.BytesIO()
        np.save(file, found.reshape(one.shape), allow_pickle=False)
        masked_numbers.append(file.getvalue())
    # Anew: records that say the same, as empty ones, are one object when they have travelled (flwr 1.42).
    reply.content.config_records[RECORD] = ConfigRecord({MASKED: masked_numbers})
    del reply.content[PIECES]
    return reply


class _Pieces:
    """A grid whose replies are whole again."""

    def __init__(self, grid: Any) -> None:
        self.grid = grid

    def send_and_receive(self, sent: Any, *, timeout: float | None = None) -> list[Any]:
        """As Flower's."""
        return [_whole_again(reply) for reply in self.grid.send_and_receive(sent, timeout=timeout)]


def summed(grid: Any, context: Any, nodes: Sequence[int], asked: Any = None, *, timeout: float) -> tuple[list[Tensor], list[int]]:
    """Sums of clients' limbs, and of which clients they are: those that stayed. `asked` goes with the request.

    Raises BadInputError where too few did.
    """
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.workflow import SecAggPlusWorkflow

    if not LEAST <= len(nodes) <= MAX_CLIENTS:
        raise BadInputError(f"secure: {len(nodes)} clients take part, expected {LEAST} to {MAX_CLIENTS}")
    workflow = SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=2 / 3,
        max_weight=1.0,
        clipping_range=LEVELS / 2,
        quantization_range=LEVELS,
        modulus_range=MODULUS,
        timeout=timeout,
    )
    strategy = _Collector(list(nodes), asked or {})
    legacy = LegacyContext(context, strategy=strategy)
    strategy.prepare(legacy)
    with strong_masks():
        workflow(_Pieces(grid), legacy)
    stayed = strategy.stayed
    if strategy.mean is None or len(stayed) < LEAST:
        raise BadInputError(f"secure: {len(stayed)} of {len(nodes)} clients took part to the end, expected {LEAST}")
    return [torch.from_numpy(one * len(stayed)).round() for one in strategy.mean], stayed


class _Collector:
    """What Flower's workflow wants as a strategy: which clients are asked, and what becomes of the mean of limbs."""

    def __init__(self, nodes: Sequence[int], asked: Any) -> None:
        self.nodes, self.asked = nodes, dict(asked)
        self.mean: Any = None
        self.stayed: list[int] = []

    def prepare(self, context: Any) -> None:
        """Enter the records that a workflow expects."""
        from flwr.app import ArrayRecord, ConfigRecord
        from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
        context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[Any]:
        """All are asked the same."""
        from flwr.common import FitIns, Parameters

        return [(_Proxy(node), FitIns(Parameters([], ""), self.asked)) for node in self.nodes]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Keep the mean, which each result has in place of its own."""
        from flwr.common import parameters_to_ndarrays

        self.stayed = [proxy.node_id for proxy, _ in results]
        self.mean = parameters_to_ndarrays(results[0][1].parameters) if results else None
        return None, {}


class _Proxy:
    """A client, as far as the workflow needs to know it."""

    def __init__(self, node: int) -> None:
        self.node_id = node
