"""chat.py --web: a page on which each class answers the same question in its own column.

    POST /ask {"conversations": [[question, answer, ..., question] of each column],
               "system": a system message, or ""}
    gives lines [column, piece of the answer, null]; a column's last line has "", or the limit that
    cut the answer short

Host and Origin are checked, against DNS rebinding and other pages' requests.
"""

import contextlib
import itertools
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.formats import Message

PORT = 8000
ROLES = "user", "assistant"
POLICY = "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def serve(chat, port, options):
    """Serve until Ctrl-C."""
    with server_of(chat, port, options) as server, contextlib.suppress(KeyboardInterrupt):
        port = server.server_port
        print(f"{chat.folder} at http://127.0.0.1:{port}; Ctrl-C ends")
        print(f"from another machine: ssh -L {port}:127.0.0.1:{port} HOST", flush=True)
        server.serve_forever()


def server_of(chat, port, options):
    seeds, turn = itertools.count(options["seed"]), threading.Lock()  # one answer at a time
    shared = {"chat": chat, "options": options, "seeds": seeds, "turn": turn}
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), type("OfChat", (Handler,), shared))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--web {port}: {error}") from None


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds for a browser that neither sends nor takes anything

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the browser has gone
            super().handle()

    def do_GET(self):
        if not self.is_from_here() or self.path != "/":
            return self.send(404, "not found")
        nonce = secrets.token_urlsafe(16)
        page = Path(__file__).with_name("web.html").read_text("utf-8").replace("NONCE", nonce)
        about = json.dumps(self.about()).replace("<", "\\u003c")  # which could end the script
        self.send(200, page.replace("ABOUT", about), "text/html", POLICY.format(nonce))

    def do_POST(self):
        if not self.is_from_here() or self.headers["Origin"] != f"http://{self.headers['Host']}":
            return self.send(403, "only this page may ask")
        try:
            prompts = self.question()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            return self.send(400, f"not asked: {error}")
        options = self.options | {"seed": next(self.seeds)}
        with self.turn, contextlib.suppress(OSError):  # one at a time; a browser may stop listening
            self.send(200, "", "application/x-ndjson")
            for event in self.chat.streams(prompts, **options):
                self.wfile.write(json.dumps(event).encode() + b"\n")

    def is_from_here(self):
        return (self.headers["Host"] or "").partition(":")[0] in ("127.0.0.1", "localhost")

    def question(self):
        """A prompt for each column; ValueError and the like for anything else."""
        chat, size = self.chat, int(self.headers["Content-Length"] or 0)
        if self.path != "/ask" or not 0 < size <= 1 << 20:
            raise ValueError("a request must go to /ask and have at most 1 MiB")
        asked, prompts = json.loads(self.rfile.read(size)), []
        system = [Message("system", asked["system"])] if asked.get("system") else []
        for name, texts in zip(chat.names, asked["conversations"], strict=True):
            if len(texts) % 2 == 0:
                raise ValueError("a conversation must end with a question")
            turns = [*system, *map(Message, itertools.cycle(ROLES), texts)]
            "".join(turn.content for turn in turns).encode()  # raises if one cannot be UTF-8
            if not (turns := chat.fitting(turns, self.options["max_new_tokens"])):
                raise ValueError(f"too long for the context of {chat.context:,} tokens")
            prompts.append(chat.prompt(turns, name))
        return prompts

    def about(self):
        """The model, as the page shows it."""
        chat, columns = self.chat, []
        for name in chat.names:
            reward, weight = chat.export.classes[name].reward, chat.export.weights.get(name)
            column = {"name": name, "reward": reward, "weight": weight}
            columns.append(column | {role: chat.prefix(name, role) for role in ROLES})
        return {"single": chat.single, "columns": columns, "endOfTurn": chat.tokenizer.template.end}

    def send(self, status, text, kind="text/plain", policy="default-src 'none'"):
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass
