"""Reads in flight: threads that bring sections of files into memory piece by piece, the urgent first, each verified.

A large section is read by all threads that are idle, and a guess under way delays a demand by one piece at most. A
piece that comes short or fails is read once more at once; so are, from the disk, the pieces of an extent that differs
from its checksum. What fails twice is a `SectionReadError` with file, section and offset. Whatever happens, a read
ends: nobody waits for ever. Knows nothing of caches.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from moesys.errors import SectionReadError, ShapeError
from moesys.store.checksums import ChecksumRecord
from moesys.store.crc32 import combine_crc32
from moesys.store.events import ReadEvent, Urgency, Verification
from moesys.store.open_files import OpenFiles, ReadAt, ReadMode, Staging, fill, read_vector
from moesys.store.pieces import PageRange, Piece, Slice, cut_section, list_pages, round_to_pages
from moesys.store.section import Section

_PIECE_BYTES = 2 * 2**20
"""Large enough that a request more costs nothing, small enough that four threads share one expert."""


class Read:
    """A section on its way. ``is_done`` becomes true with or without an error.

    verification: of some use once it is done without an error.
    """

    def __init__(self, section: Section, buffers: Sequence[memoryview], urgency: Urgency) -> None:
        self.section = section
        self.urgency = urgency
        self.error: SectionReadError | None = None
        self.verification = Verification.SKIPPED
        self.is_done = False
        self._buffers = tuple(buffers)
        self._num_left = 0
        self._was_repeated = False
        self._checksums: dict[Slice, int] = {}
        self._queued_s = time.perf_counter()
        self._started_s: float | None = None


class SectionReader:
    """Reads sections with ``num_threads`` requests in flight. Close it, or use it as a context."""

    def __init__(
        self,
        num_threads: int = 4,
        *,
        mode: ReadMode = ReadMode.BUFFERED,
        verifies: bool = True,
        keeps_pages: bool = False,
        checksums: ChecksumRecord | None = None,
        read_at: ReadAt | None = None,
        on_read: Callable[[ReadEvent], None] | None = None,
    ) -> None:
        """
        verifies:     whether checksums are computed and compared: those of the section, else those of ``checksums``.
        keeps_pages:  whether the system may keep what was read in its page cache, beside our slots; buffered only.
        checksums:    of files that carry none; None for those of the first read, forgotten with it. `close` saves them.
        read_at:      how bytes are read; for tests.
        on_read:      is called once for each section, before its read is done, by the thread that ends it.

        Raises `ShapeError` for no threads, or pages that direct reads would have to keep.
        """
        if num_threads < 1:
            raise ShapeError(f"a reader needs at least 1 thread, got {num_threads}")
        if keeps_pages and mode is ReadMode.DIRECT:
            raise ShapeError(
                "direct reads leave no pages that could be kept; drop keeps_pages or read buffered"
            )
        self.verifies = verifies
        self._keeps_pages = keeps_pages
        self._checksums = ChecksumRecord() if checksums is None else checksums
        self._read_at = read_vector if read_at is None else read_at
        self._on_read = on_read
        self._files = OpenFiles(mode)
        self._kept_pages: dict[PageRange, None] = {}
        self._page_bytes = 0
        self._waiting: dict[Urgency, dict[Read, deque[Piece]]] = {urgency: {} for urgency in Urgency}
        lock = threading.Lock()
        self._has_work = threading.Condition(lock)
        self._has_finished = threading.Condition(lock)
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"moesys-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> SectionReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def mode(self) -> ReadMode:
        return self._files.mode

    @property
    def page_cache_bytes(self) -> int:
        """Bytes of ours that the system may hold in its page cache now: of sections that are being read, and with
        ``keeps_pages`` of all that were. Whole pages, so that sections that share one count it twice."""
        return self._page_bytes

    @property
    def staging_bytes(self) -> int:
        """Bytes of the threads' own buffers, besides the slots."""
        return len(self._threads) * Staging.count_bytes(_PIECE_BYTES) if self.mode is ReadMode.DIRECT else 0

    def require_open(self) -> None:
        """Raises `SectionReadError` when the reader was closed."""
        if self._is_closed:
            raise SectionReadError(
                "the files of this model were closed; use it while they are open, or load it again"
            )

    def submit(self, section: Section, buffers: Sequence[memoryview], urgency: Urgency) -> Read:
        """Starts reading a section: one buffer per extent, of its size. Nobody else may touch them until it is done.

        Raises `ShapeError` for other buffers, and `SectionReadError` when the reader was closed.
        """
        sizes = [extent.num_bytes for extent in section.extents]
        if [len(buffer) for buffer in buffers] != sizes:
            raise ShapeError(
                f"section {section.name} needs buffers of {sizes} bytes, got {[len(buffer) for buffer in buffers]}"
            )
        read = Read(section, buffers, urgency)
        pieces = cut_section(section, _PIECE_BYTES)
        with self._has_work:
            self.require_open()
            self._enqueue(read, pieces)
        return read

    def hurry(self, read: Read) -> None:
        """Makes a prefetch a demand: what of it still waits goes before all prefetches."""
        with self._has_work:
            read.urgency = Urgency.DEMAND
            pieces = self._waiting[Urgency.PREFETCH].pop(read, None)
            if pieces is not None:
                self._waiting[Urgency.DEMAND][read] = pieces

    def wait_any(self, reads: Sequence[Read]) -> None:
        """Waits until at least one of the reads is done."""
        with self._has_finished:
            self._has_finished.wait_for(lambda: any(read.is_done for read in reads))

    def close(self) -> None:
        """Stops after the pieces in flight; what waits ends with an error. Closes the files, saves the checksums."""
        with self._has_work:
            self._is_closed = True
            self._has_work.notify_all()
        while (taken := self._take_waiting()) is not None:
            read, pieces = taken
            self._finish_pieces(read, len(pieces), _make_closed_error(read.section))
        for thread in self._threads:
            thread.join()
        self._files.close()
        self._checksums.save()

    def _enqueue(self, read: Read, pieces: Sequence[Piece]) -> None:
        read._num_left += len(pieces)
        self._waiting[read.urgency][read] = deque(pieces)
        self._has_work.notify(len(pieces))

    def _take_waiting(self) -> tuple[Read, deque[Piece]] | None:
        with self._has_work:
            return next((waiting.popitem() for waiting in self._waiting.values() if waiting), None)

    def _serve(self) -> None:
        staging = Staging(_PIECE_BYTES) if self.mode is ReadMode.DIRECT else None
        while (taken := self._take()) is not None:
            read, piece = taken
            error = None
            try:
                self._read_piece(read, piece, staging)
            except SectionReadError as found:
                error = found
            except Exception as found:  # noqa: BLE001  whoever waits must learn of it, and other reads must go on
                error = _wrap(found, _describe_piece(read.section, piece))
            self._finish_pieces(read, 1, error)

    def _take(self) -> tuple[Read, Piece] | None:
        """Waits for the next piece to read, the most urgent one; returns None when the reader was closed."""
        with self._has_work:
            self._has_work.wait_for(lambda: self._is_closed or any(self._waiting.values()))
            if self._is_closed:
                return None
            waiting = next(filter(None, self._waiting.values()))
            read, pieces = next(iter(waiting.items()))
            piece = pieces.popleft()
            if not pieces:
                del waiting[read]
            if read._started_s is None:
                read._started_s = time.perf_counter()
                self._count_pages(list_pages(read.section), 1)
            return read, piece

    def _finish_pieces(self, read: Read, num_pieces: int, error: SectionReadError | None) -> None:
        """Takes note that pieces are read, or never will be; ends the read with its last one."""
        with self._has_finished:
            read.error = read.error or error
            read._num_left -= num_pieces
            if read._num_left:
                return
        try:
            repeated = self._verify(read) if read.error is None else []
        except SectionReadError as found:
            read.error, repeated = found, []
        except Exception as found:  # noqa: BLE001  as above
            read.error, repeated = _wrap(found, f"section {read.section.name}"), []
        if repeated:
            with self._has_work:
                if not self._is_closed:
                    self._enqueue(read, repeated)
                    return
            read.error = _make_closed_error(read.section)
        self._end(read)

    def _end(self, read: Read) -> None:
        if self._on_read is not None:
            try:
                self._on_read(_make_event(read))
            except Exception as found:  # noqa: BLE001  as above
                read.error = read.error or _wrap(found, f"on_read of section {read.section.name}")
        with self._has_finished:
            read.is_done = True
            self._has_finished.notify_all()
        if read._started_s is not None and self.mode is ReadMode.BUFFERED:
            self._drop_behind(read.section)

    def _drop_behind(self, section: Section) -> None:
        pages = list_pages(section)
        if self._keeps_pages:
            with self._has_work:
                again = [part for part in pages if part in self._kept_pages]
                self._kept_pages |= dict.fromkeys(pages)
                self._count_pages(again, -1)
            return
        for part in pages:
            self._files.drop_pages(part)
        with self._has_work:
            self._count_pages(pages, -1)

    def _count_pages(self, pages: Iterable[PageRange], sign: int) -> None:
        if self.mode is ReadMode.BUFFERED:
            self._page_bytes += sign * sum(part.num_bytes for part in pages)

    def _read_piece(self, read: Read, piece: Piece, staging: Staging | None) -> None:
        """Reads one piece, a second time if need be, and hashes its slices."""
        buffers = [read._buffers[part.extent_id][part.start : part.stop] for part in piece.slices]
        reason = self._try_piece(piece, buffers, staging)
        if reason is not None:
            self._forget_extents(read.section, {part.extent_id for part in piece.slices})
            reason = self._try_piece(piece, buffers, staging)
        if reason is not None:
            raise SectionReadError(
                f"{_describe_piece(read.section, piece)} {reason}, twice; check the disk and the file, then load the "
                "model again"
            )
        if self.verifies:
            for part, buffer in zip(piece.slices, buffers, strict=True):
                read._checksums[part] = zlib.crc32(buffer)

    def _try_piece(self, piece: Piece, buffers: Sequence[memoryview], staging: Staging | None) -> str | None:
        """Returns why the piece was not read, None when it was."""
        try:
            descriptor = self._files.open(piece.file)
            if staging is None:
                done = fill(self._read_at, descriptor, buffers, piece.offset)
            else:
                done = staging.fill(self._read_at, descriptor, buffers, piece.offset)
        except SectionReadError:
            raise
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        return None if done == piece.num_bytes else f"ends after {done} bytes"

    def _verify(self, read: Read) -> list[Piece]:
        """Compares the checksums of a section that was read; returns the pieces to be read once more.

        Raises `SectionReadError` for what differs again, and where a file was changed in the meantime.
        """
        section = read.section
        for file in {extent.file for extent in section.extents}:
            self._files.open(file)
        if not self.verifies:
            return []
        found = self._combine_checksums(read)
        expected, read.verification = self._find_expected(section, found)
        bad = {i for i, checksum in enumerate(found) if checksum != expected[i]}
        if not bad:
            return []
        if read._was_repeated:
            raise self._make_difference_error(section, min(bad))
        read._was_repeated = True
        self._forget_extents(section, bad)
        return [
            piece
            for piece in cut_section(section, _PIECE_BYTES)
            if any(part.extent_id in bad for part in piece.slices)
        ]

    def _find_expected(self, section: Section, found: Sequence[int]) -> tuple[Sequence[int], Verification]:
        """Returns the checksums that the extents must have; what nobody knew is noted as it was found."""
        if section.checksums is not None:
            return section.checksums, Verification.COMPARED
        known = [self._checksums.find(extent) for extent in section.extents]
        if None not in known:
            return [checksum for checksum in known if checksum is not None], Verification.COMPARED
        noted = [self._checksums.note(*pair) for pair in zip(section.extents, found, strict=True)]
        return noted, Verification.RECORDED

    def _combine_checksums(self, read: Read) -> list[int]:
        parts: list[list[tuple[int, int]]] = [[] for _ in read.section.extents]
        for part in sorted(read._checksums, key=lambda part: part.start):
            parts[part.extent_id].append((read._checksums[part], part.num_bytes))
        return [combine_crc32(sums) for sums in parts]

    def _make_difference_error(self, section: Section, extent_id: int) -> SectionReadError:
        extent = section.extents[extent_id]
        fix = "check the disk and the file, then load the model again"
        if section.checksums is None and (record := self._checksums.doubt(extent)) is not None:
            fix = f"check the disk and the file; delete {record}, where an earlier run noted it, if the file is right"
        return SectionReadError(
            f"{extent.file.path}: section {section.name} at byte {extent.offset} ({extent.num_bytes} bytes) differs "
            f"from its checksum, twice; {fix}"
        )

    def _forget_extents(self, section: Section, extent_ids: Iterable[int]) -> None:
        """Sees to it that they are read from the disk the next time, and not from the system's memory."""
        if self.mode is ReadMode.BUFFERED:
            for extent_id in extent_ids:
                extent = section.extents[extent_id]
                self._files.drop_pages(round_to_pages(extent, extent))


def _make_event(read: Read) -> ReadEvent:
    finished_s = time.perf_counter()
    return ReadEvent(
        read.section.name,
        read.section.num_bytes,
        read._queued_s,
        finished_s if read._started_s is None else read._started_s,
        finished_s,
        read.urgency,
        read.error is not None,
    )


def _make_closed_error(section: Section) -> SectionReadError:
    return SectionReadError(
        f"section {section.name} was not read: its files were closed before; load the model again"
    )


def _describe_piece(section: Section, piece: Piece) -> str:
    return f"{piece.file.path}: section {section.name} at byte {piece.offset} ({piece.num_bytes} bytes)"


def _wrap(cause: Exception, what: str) -> SectionReadError:
    error = SectionReadError(f"{what} could not be read: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
