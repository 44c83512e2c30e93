"""What a stranger's query may take."""

from dataclasses import asdict, dataclass

from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["SqlLimits"]


@dataclass(frozen=True)
class SqlLimits:
    """What one query may take, and how many may run.

    Attributes:
        seconds: wall-clock time of a query.
        rows: rows of an answer at most; a query may ask for fewer.
        default_rows: rows of an answer whose length nobody names.
        cells: rows x columns of an answer; one row always fits.
        scan_cells: values of derived scalars that a query may look at.
        result_bytes: Arrow bytes of an answer.
        memory_bytes: DuckDB's memory in one process.
        threads: DuckDB's threads in one process.
        processes: queries that run at once.
        waiting: queries that may wait for a process.
        wait_seconds: how long one of them waits at most.
        query_characters: length of a query.
        start_seconds: how long a process may take to open the store.
    """

    seconds: float = 10.0
    rows: int = 100_000
    default_rows: int = 1000
    cells: int = 2_000_000
    scan_cells: int = 200_000_000
    result_bytes: int = 64 * 2**20
    memory_bytes: int = 512 * 2**20
    threads: int = 1
    processes: int = 2
    waiting: int = 32
    wait_seconds: float = 30.0
    query_characters: int = 100_000
    start_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise InvalidInput(
                    f"{name} is {value}; it must be positive.", kind=ErrorKind.INVALID_ARGUMENT
                )
        if self.default_rows > self.rows:
            raise InvalidInput(
                f"default_rows is {self.default_rows}, more than the limit of {self.rows} rows.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
