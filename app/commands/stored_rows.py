"""What the store has of the rows that a load is about to publish: asked in batches, one round trip each."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Final, Self

from app.adapters.redis_feast import RedisFeatureStore
from app.domain.errors import ConfigurationError, StoreUnavailable
from app.domain.feature_news import StoredRow
from app.domain.features import EntityKey, ViewNeed
from app.domain.view_documents import FeatureViewSpec
from app.observability import logs_of_a_command
from app.settings import Settings

ROWS_AT_ONCE: Final = 200
BYTES_AT_ONCE: Final = 4 * 1024 * 1024
"""Of updates: what the store has of their rows is about as much."""
_ASKED_WITHIN_MS: Final = 10_000


@contextmanager
def redis_answers() -> Iterator[None]:
    """A Redis that does not answer is an error of the configuration, told with the variable's name."""
    try:
        with logs_of_a_command():
            yield
    except StoreUnavailable as error:
        raise ConfigurationError(f"{error}: is it running, and is BROKER_REDIS_URL right?") from error


class StoredRows(AbstractContextManager["StoredRows"]):
    """Asks for rows of one view: of ``features``, and for no others.

    Raises (on entry, and by each question):
        ConfigurationError: Redis does not answer.
    """

    def __init__(self, settings: Settings, view: str, spec: FeatureViewSpec, features: Sequence[str]) -> None:
        self._settings = settings
        self._view = view
        self._features = tuple(features)
        self._types = tuple(spec.types[name] for name in features)
        self._runner = asyncio.Runner()
        self._store: RedisFeatureStore | None = None

    def __enter__(self) -> Self:
        self._runner.__enter__()
        try:
            with redis_answers():
                self._runner.run(self._open())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None:
            self._runner.run(self._store.close())
        self._runner.close()

    def of(self, keys: Sequence[EntityKey]) -> dict[EntityKey, StoredRow]:
        """What is there of each entity."""
        with redis_answers():
            return self._runner.run(self._ask(list(dict.fromkeys(keys))))

    async def _open(self) -> None:
        store = RedisFeatureStore(self._settings.redis_url, value_bytes_max=self._settings.feature_value_bytes_max)
        try:
            await store.ping()
        except BaseException:
            await store.close()
            raise
        self._store = store

    async def _ask(self, keys: Sequence[EntityKey]) -> dict[EntityKey, StoredRow]:
        assert self._store is not None  # noqa: S101 - it is there between entry and exit
        needs = [ViewNeed(self._view, key, self._features, self._types) for key in keys]
        return dict(zip(keys, await self._store.stored(needs, _ASKED_WITHIN_MS), strict=True))
