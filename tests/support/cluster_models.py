"""The HTTP models of a test cluster: one Open Inference Protocol server in a thread, told by a test how to behave."""

import asyncio
import threading
from collections import Counter
from typing import Any, Final, Literal

import orjson
from aiohttp import web

Mode = Literal["ok", "hang", "error", "garbage", "slow", "off"]
"""``off`` answers, and is one above what it should be."""
SLOW_S: Final = 0.5
_START_WITHIN_S: Final = 30.0


class SwitchableModels:
    """Answers ``y = 2 * x + score`` for every model, unless ``switch`` said otherwise; counts calls by request id."""

    def __init__(self) -> None:
        self.url = ""
        self._modes: dict[str, Mode] = {}
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-models", daemon=True)
        self._runner: web.AppRunner | None = None
        self._released = asyncio.Event()

    def start(self) -> None:
        """Serve on a free port."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(_START_WITHIN_S)

    def stop(self) -> None:
        """Stop serving, whatever hangs."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_START_WITHIN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_WITHIN_S)
        self._loop.close()

    def switch(self, model: str, mode: Mode) -> None:
        """How ``model`` behaves from now on."""
        with self._lock:
            self._modes[model] = mode
        if mode != "hang":
            self._loop.call_soon_threadsafe(self._release)

    def heal(self) -> None:
        """All models answer again."""
        with self._lock:
            self._modes.clear()
        self._loop.call_soon_threadsafe(self._release)

    def calls(self, request_id: str) -> int:
        """How often any model was called for a request."""
        with self._lock:
            return self._calls[request_id]

    def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v2/models/{model}/versions/{version}/infer", self._infer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        self._release()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _infer(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        model = request.match_info["model"]
        request_id = request.headers["Idempotency-Key"].rsplit(":", 2)[0]
        with self._lock:
            self._calls[request_id] += 1
            mode = self._modes.get(model, "ok")
        match mode:
            case "hang":
                await self._released.wait()
            case "error":
                return web.Response(status=500, text="the model is out of order")
            case "garbage":
                return web.Response(body=b'{"outputs": [', content_type="application/json")
            case "slow":
                await asyncio.sleep(SLOW_S)
            case "ok" | "off":
                pass
        answer = _answer(body, error=1 if mode == "off" else 0)
        return web.Response(body=orjson.dumps(answer), content_type="application/json")


def _answer(body: dict[str, Any], *, error: int) -> dict[str, Any]:
    inputs = {tensor["name"]: tensor["data"] for tensor in body["inputs"]}
    data = [2 * x + score + error for x, score in zip(inputs["x"], inputs["score"], strict=True)]
    return {"outputs": [{"name": "y", "shape": [len(data)], "datatype": "FP64", "data": data}]}
