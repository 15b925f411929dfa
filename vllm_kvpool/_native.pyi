"""The native core: pool file, index, leases, eviction, checksums and copies.

Conventions of this boundary
----------------------------
*Arrays travel as bytes.* `keys` is n x 32 bytes; `refs` is n little-endian `uint64` slot references (any
contiguous buffer is accepted, `bytes` is returned). One call handles one batch; there is no per-block call.

*A slot reference* (`ref`) is `generation << 32 | slot index`. `0` means "no slot". A reference is stale, and every
use of it a miss, once the slot's generation has moved on.

*Time is an argument.* `now_s` is seconds of CLOCK_BOOTTIME (it survives processes, not reboots: as the pool does).

Errors: `PoolFormatError` (not a pool, other format version, size changed, corrupt header), `OSError` (the kernel
said no: ENOSPC, EACCES ...), `ValueError` (an argument of the wrong shape).
"""

from collections.abc import Sequence

from typing_extensions import Buffer

FORMAT_VERSION: int
MAX_CLIENTS: int
MAX_NAMESPACES: int

class PoolFormatError(Exception): ...

class IntegrityError(AssertionError):
    """A broken invariant of the core itself."""

def crc32c(data: Buffer, seed: int = 0) -> int:
    """CRC-32C (Castagnoli) of `data`; hardware instructions where the processor has them."""

def copy_checked(destination: Buffer, source: Buffer, seed: int = 0) -> int:
    """Copy `source` over `destination` (of the same length) and return the CRC-32C of what is there now, in one pass
    and without the GIL. `seed` is the checksum of what comes before: pieces add up to the checksum of the whole."""

def derive_keys(mask: bytes, hashes: Buffer) -> bytes:
    """Block keys (n x 32 bytes) of n x 32-byte block hashes: each hash XOR the 32-byte `mask` (see keys.py)."""

class PoolOwner:
    """The daemon's side of a pool: the only writer of index, slot states and tables. Not thread-safe but `populate`.

    Counting equation, per namespace: free + writing + ready + doomed == slots of its slabs.
    """

    @staticmethod
    def create(
        path: str, size: int, min_slot_bytes: int = 65536, *, mode: int = 0o600, policy: str = ""
    ) -> PoolOwner:
        """Make a pool file of `size` bytes. `policy` is "lru", "arc" or "s3fifo" ("" = the default)."""
    @staticmethod
    def attach(path: str, *, now_s: int, policy: str = "") -> PoolOwner:
        """Recover an existing file: READY slots whose header checksum fits are kept, WRITING slots of known
        clients are kept until these complete them or `reap_clients` finds them dead, the rest becomes free; the
        index is rebuilt; the epoch grows by one.
        The file is unmapped when the object goes."""
    path: str
    epoch: int
    pool_id: str
    """32 hex digits drawn at creation: tells one file from the next of the same name."""
    size: int
    slab_bytes: int
    num_slabs: int
    num_slots: int
    """Slot numbers lie below."""
    min_slot_bytes: int

    # memory ------------------------------------------------------------------------------------------------------
    def advise_hugepages(self) -> None: ...
    def bind_numa(self, nodes: list[int]) -> None:
        """One node: bind to it; several: interleave over them."""
    def populate(self, slab: int) -> None:
        """Touch every page of a slab (GIL released; many threads may do it for different slabs). The slab may be
        handed out from then on. OSError when the mount is full."""
    populated_slabs: int

    # namespaces and clients --------------------------------------------------------------------------------------
    def add_namespace(self, digest: bytes, slot_bytes: int, description: str) -> int:
        """Index of the namespace, made when new. ValueError: digest known with another `slot_bytes`, a slot larger
        than a slab, or the table is full."""
    def namespaces(self) -> list[dict[str, object]]:
        """index, digest (hex), slot_bytes, description, slabs, slots, free, writing, ready, doomed, pinned."""
    def add_client(self, client_id: str, lock_path: str, pid: int, namespace: int) -> int:
        """Index of the client (the same one when `client_id` is known). RuntimeError when the table is full."""
    def clients(self) -> list[dict[str, object]]:
        """index, client_id, pid, namespace, leases."""
    def reap_clients(self, now_s: int, grace_s: int) -> list[str]:
        """Take back leases and WRITING slots of clients whose lock file nobody holds since `grace_s`; their ids."""

    # blocks ------------------------------------------------------------------------------------------------------
    def prepare_store(
        self,
        client: int,
        keys: Buffer,
        parent: bytes,
        now_s: int,
        *,
        expiry_s: int = 0,
        pin: bool = False,
        source: bytes = b"",
    ) -> bytes:
        """A WRITING slot for each key of a chain (in chain order), 0 for those present already and, from the first
        that finds no room, for all the rest. `parent` is the key before the first, b"" for none. `source`: 16 bytes,
        the host that the blocks come from; they are its copies, unless pinned (docs/eviction.md)."""
    def complete_store(self, client: int, refs: Buffer) -> int:
        """WRITING -> READY for the refs this client owns; how many are READY now. Idempotent."""
    def abort_store(self, client: int, refs: Buffer) -> int: ...
    def keep_writing(self, client: int, refs: Buffer) -> int:
        """Give up all WRITING slots of the client except `refs`; how many were given up."""
    def touch(self, refs: Buffer) -> None:
        """A chain (head first) was used: count it for eviction."""
    def drop(self, refs: Buffer) -> int:
        """Forget READY blocks (their bytes are wrong); leased ones become invisible, free once released."""
    def clear(self, namespace: int = -1, *, pinned: bool = True) -> int:
        """Forget all READY blocks that nobody leases (of one namespace); how many."""
    def expire(self, now_s: int) -> int:
        """Forget blocks whose time is over; how many."""
    def evict(self, namespace: int, count: int) -> int: ...
    def mark_copies(self, keys: Buffer, source: bytes) -> int:
        """That host has these blocks, too: the READY ones that are nobody's copies yet, and not pinned, become its
        copies, as if used once; how many did."""
    def copy_sources(self) -> list[bytes]:
        """Hosts that blocks here are copies of."""
    def forget_source(self, source: bytes) -> None:
        """That host's blocks are not to be counted on: its copies here are ordinary blocks from now on."""
    def keep_journal(self) -> None:
        """From now on note what becomes READY and what is forgotten, for `take_changes`."""
    def take_changes(self) -> list[tuple[int, bytes, bytes]]:
        """Since the last call, by namespace: (its index, keys that became READY, keys that were forgotten). A key in
        both has come and gone; whether it is there now, the index knows."""
    def ready_keys(self, first: int, limit: int) -> tuple[int, bytes, int]:
        """Looks at no more than `limit` slots from number `first` on: the namespace that has them (-1: none), the
        keys of the READY blocks among them, and the slot to go on with (`num_slots` at the end)."""
    def ready_leaves(self, first: int, limit: int) -> tuple[int, list[tuple[bytes, bytes]], int]:
        """As `ready_keys`, but only blocks that no block follows, each as (key of the block before it, its key); b""
        before a head. Not those that have lost the block before them."""
    def path_to(self, key: bytes) -> bytes:
        """Keys of the chain that ends with `key`, head first; b"" when it is not READY up to there, or has lost its
        head."""
    def beat(self, now_ms: int, pid: int) -> None:
        """Write the heartbeat that `ls` and `doctor` display."""
    def stats(self) -> dict[str, int]:
        """Counters and gauges by name: ready, writing, free, populated_slabs, stored, evicted, expired, dropped,
        no_room, duplicates, aborted, reaped_clients, lease_vetoes, slabs_moved, recovered, ..."""
    def check_integrity(self) -> None:
        """IntegrityError naming the first broken invariant (index <-> slots, counts, free lists, policy, chains)."""

class Payload:
    """What the memoryviews of `PoolView.payload` are views of: it keeps the file mapped for as long as they live."""

class PoolView:
    """A client's view of a pool file: lookups and leases in shared memory, without locks and without the daemon."""

    @staticmethod
    def open(path: str) -> PoolView:
        """The file is unmapped when the view is gone, and all copy engines over it are closed."""
    path: str
    pool_id: str
    epoch: int
    num_slots: int
    def info(self) -> dict[str, object]:
        """Header and counts for display: size, slab_bytes, num_slabs, min_slot_bytes, pool_id, epoch, pid,
        heartbeat_ms, namespaces (digest, slot_bytes, description), clients, format_version."""
    def match_prefix(self, keys: Buffer, now_s: int) -> bytes:
        """Refs of the longest run of leading READY blocks."""
    def attach_client(self, client: int) -> None:
        """From now on leases are taken in this client's bitmap. Drops none: held leases must be 0."""
    def lease(self, refs: Buffer) -> bytes:
        """One byte a ref: 1 when the slot is leased and still is that block. Counted per slot in this process."""
    def release(self, refs: Buffer) -> None: ...
    leased_slots: int
    def payload(self, ref: int) -> memoryview:
        """The writable bytes of a slot (tests, tools and remote transfer; workers copy through CopyEngine)."""
    def check_integrity(self) -> None: ...

class CopyEngine:
    """Moves blocks between one worker's KV memory and pool slots, on its own threads.

    `device` < 0: KV memory is ordinary memory, copied by `threads` threads. Otherwise it is memory of that CUDA device
    (an ordinal, as torch counts), which copies by DMA on streams of its own; submitting never waits.
    The pool is registered with CUDA in the background, slabs as the daemon makes them; until then copies are slower.
    `way` is for benchmarks and tests: "driver" (a copy for each fragment, in batches) or "staged" (a copy for each
    block, through 4 x 64 MiB of device memory); "" tries both at the start and keeps the better one for each direction.

    `regions` is n x (base address, block stride in bytes, bytes per block), as tuples; block b of region r lies at
    `base + b * stride`. A slot holds the shards of all ranks; this worker's shard begins at `shard_offset` in the
    slot and is the regions' bytes in order, then an 8-byte trailer {crc32c, mark}.
    `checksum`: every n-th block (by key) carries a payload checksum: 0 none, 1 all.
    """

    def __init__(
        self,
        view: PoolView,
        regions: Sequence[tuple[int, int, int]],
        shard_offset: int,
        checksum: int,
        threads: int = 2,
        device: int = -1,
        way: str = "",
    ) -> None:
        """OSError (ENODEV): no such CUDA device, or no driver. ValueError: no regions, or no such `way`."""
    @staticmethod
    def shard_bytes(regions: Sequence[tuple[int, int, int]]) -> int:
        """Of one shard with its trailer, rounded up to 256."""
    backend: str
    """What copies, and how, for the log: "cpu", "cuda NVIDIA H200, loads staged, stores staged". It
    changes: nothing is calibrated at first, memory is refused by and by, and a device may be switched off."""
    error: str
    """The last error of the device, "cuGraphLaunch: CUDA_ERROR_ILLEGAL_ADDRESS"; "" while there was none."""
    is_off: bool
    """Whether the device is not asked any more, and all copies fail: after three failed batches of loads in a row, or
    of stores, or one error that ends the CUDA context."""
    registered_bytes: int
    """Of the pool, known to the device by now. How `backend` copies them is decided once there are any."""
    costs: dict[str, int]
    """Of a device's copies so far: batches (each is waited for once), copies (that the device was asked for), start_ns
    and wait_ns (processor time of asking, and of falling asleep and waking up). For benchmarks; gone after `close`."""
    def submit_store(self, refs: Buffer, blocks: Buffer, stream: int = 0) -> int:
        """Start VRAM -> slot copies; `blocks` is n x uint32 block numbers. Returns a job number (> 0).
        `stream` is a cudaStream_t (0: the default stream): the copies come after all that it has been given so far."""
    def submit_load(self, refs: Buffer, blocks: Buffer, stream: int = 0) -> int: ...
    def poll(self) -> list[tuple[int, bytes, int]]:
        """Finished jobs: (job, one status byte a block: see COPY_*, nanoseconds from submit to end). Never waits."""
    def arriving(self, milliseconds: int = 0) -> list[int]:
        """Loads whose last bytes are on their way: only the loss of the device, or of a lease, can still spoil them.
        Each is reported by `poll` as well, once it has ended. Waits so long for one, while loads are under way of which
        `poll` has nothing to tell."""
    def order_after_loads(self, stream: int) -> bool:
        """What `stream`, a cudaStream_t, is given from now on comes after the loads that are arriving; nobody waits.
        False where that cannot be had (memory of this process, a device that refuses): `wait` for them."""
    def wait(self, job: int, milliseconds: int) -> bool:
        """Until the job has ended, however it did; the next `poll` tells. False: it has not in that time."""
    loads_stand_still_s: float
    """Seconds for which no batch of any load has ended, while loads are under way; 0 without any. Batches are what the
    device is asked for at once (blocks on a CPU). Counts from the first look that finds the oldest load free to begin:
    what its stream was given before it has ended."""
    def cancel(self, job: int) -> None:
        """Stop a job; returns when no thread touches its memory. Its unfinished blocks end as COPY_CANCELLED and
        the job is reported by the next `poll`."""
    def close(self) -> None:
        """Stop all jobs, unregister the pool (with a GPU and a large pool: seconds, GIL released) and let go of it."""

COPY_OK: int
COPY_STALE: int
"""The slot was not (or no longer) the block that the reference names."""
COPY_CHECKSUM: int
COPY_CANCELLED: int
COPY_FAILED: int
"""The device refused (see `CopyEngine.error`); for a load the bytes in KV memory are undefined."""
COPY_UNMAPPED: int
"""Of no engine: what a worker reports that could not map the pool."""
