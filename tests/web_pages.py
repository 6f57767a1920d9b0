"""A page served inside the test's process, by models that are scripted and take their time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from chat_models import ScriptedModel

from chat.safety import RedFlagWatch
from chat.web import WebModel, WebSettings, build_page
from chat.web_server import listen, new_server, page_app

WATCH = RedFlagWatch.load(emergency_number="112")


class SlowModel(ScriptedModel):
    """Waits before every character; ``said`` counts them, ``sampling`` keeps what was asked for."""

    def __init__(self, outputs: Sequence[str], seconds: float = 0.004, **settings: object) -> None:
        super().__init__(outputs, **settings)  # type: ignore[arg-type]
        self.seconds = seconds
        self.said = 0
        self.sampling: list[dict[str, object]] = []

    def generate(self, ids: Sequence[int], max_new_tokens: int, **sampling: object) -> Iterator[int]:
        self.sampling.append({"max_new_tokens": max_new_tokens, **sampling})
        for token in super().generate(ids, max_new_tokens, **sampling):  # type: ignore[arg-type]
            time.sleep(self.seconds)
            self.said += 1
            yield token


@contextmanager
def served(
    models: Sequence[WebModel], *, seed: int | None = 0, password: str | None = None, only_local: bool = True
) -> Iterator[str]:
    """The page's address."""
    listener, _ = listen("127.0.0.1", 0)
    settings = WebSettings(WATCH, seed=seed)
    with listener, build_page(models, settings) as page:
        app = page_app(page, password=password, only_local=only_local)
        server = new_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
