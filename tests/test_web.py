"""chat.py --web: for this machine's browser alone, one answer at a time, text that stays text."""

import contextlib
import http.client
import json
import re
import socket
import struct
import threading
import time

import browser
import pytest
import small
import torch

import chat
import data
import loss
import model
from support import web

OPTIONS = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 0}


@pytest.fixture(scope="module")
def talker(sums, tmp_path_factory):
    """A model of random weights, exported."""
    config = model.LlamaConfig.from_folder(sums)
    llama = model.Llama(config)
    torch.manual_seed(1)
    small.make_random(llama)
    weights = {"gpt4": 1.0, "gpt3.5": 0.1}
    folder = tmp_path_factory.mktemp("web") / "model"
    small.export(llama, data.Tokenizer(sums), folder, weights=weights)
    return chat.Chat(folder, device="cpu")


@contextlib.contextmanager
def served(talker, **options):
    with web.server_of(talker, 0, OPTIONS | options) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def port(talker):
    with served(talker) as port:
        yield port


def request(port, method="GET", path="/", body=None, **headers):
    """(status, headers, text); a header that is None is left out."""
    headers = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    if body is not None:
        headers = {"Content-Length": len(body)} | headers
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, str(value))
    connection.endheaders(body)
    response = connection.getresponse()
    found = response.status, response.headers, response.read().decode()
    connection.close()
    return found


def asked(*conversations, **more):
    return json.dumps({"conversations": conversations} | more).encode()


HI = asked(["Hi"], ["Hi"])


def answers(port, body):
    """The text of each column, and how it ended."""
    status, _, text = request(port, "POST", "/ask", body)
    assert status == 200, text
    texts, ends = ["", ""], [None, None]
    for line in text.splitlines():
        column, piece, cut = json.loads(line)
        assert ends[column] is None  # its last came before
        texts[column] += piece
        ends[column] = cut
    return texts, ends


# ------------------------------------------------------------------------------------- what it does


def test_each_column_has_what_its_class_answers_alone(talker, port):
    said = [["1+2"], ["1+2", "30", "3+3"]]
    texts, ends = answers(port, asked(*said))
    limit = "cut after 12 tokens: --max-new-tokens or the model's context"
    for name, of, text, end in zip(("gpt4", "gpt3.5"), said, texts, ends, strict=True):
        alone = chat.Chat(talker.folder, name, device="cpu")
        turns = [data.Message(("user", "assistant")[i % 2], t) for i, t in enumerate(of)]
        assert alone.answers([turns], max_new_tokens=12) == [(text, end == "")] and text
        assert end in ("", limit)


def test_a_system_message_comes_first_in_every_column(talker, port):
    texts, _ = answers(port, asked(["Hi"], ["Hi"], system="1 + 1"))
    turns = [data.Message("system", "1 + 1"), data.Message("user", "Hi")]
    for name, text in zip(("gpt4", "gpt3.5"), texts, strict=True):
        alone = chat.Chat(talker.folder, name, device="cpu")
        assert alone.answers([turns], max_new_tokens=12)[0][0] == text
    assert answers(port, HI) == answers(port, asked(["Hi"], ["Hi"], system=""))


def test_a_request_of_very_many_turns_is_answered_at_once(talker, port):
    """1 MiB of them, whose tokens would be counted again for every turn that is left out."""
    conversation = ["a"] * 100_001
    began = time.process_time()
    _, ends = answers(port, asked(conversation, conversation))
    assert None not in ends and time.process_time() - began < 10


def test_a_column_that_ends_says_so_at_once(talker, port, monkeypatch):
    word, eot = talker.tokenizer.encode("12"), talker.tokenizer.eot
    steps = [[word[0], eot], [word[1], None], [eot, None]]
    monkeypatch.setattr(chat, "generate", lambda *_, **__: iter(steps))
    _, _, text = request(port, "POST", "/ask", HI)
    assert [json.loads(line)[0] for line in text.splitlines() if line.endswith('""]')] == [1, 0]
    assert answers(port, HI)[1] == ["", ""]


def test_each_question_is_sampled_anew_and_the_same_server_repeats(talker):
    def three():
        with served(talker, temperature=1.0) as port:
            return [answers(port, HI)[0] for _ in range(3)]

    first = three()
    assert first == three() and first[0] != first[1] != first[2]


def shown(page):
    """What the page knows of the model."""
    return json.loads(re.search(r"const about = (.*), \$ = ", page)[1])


def test_the_page_shows_each_class_with_its_condition_reward_and_weight(port):
    status, _, page = request(port)
    assert status == 200
    assert shown(page)["columns"] == [
        {"name": "gpt4", "user": "GPT4 User:", "assistant": "GPT4 Assistant:", "reward": 1.0,
         "weight": 1.0},
        {"name": "gpt3.5", "user": "GPT3 User:", "assistant": "GPT3 Assistant:", "reward": 0.0,
         "weight": 0.1},
    ]  # fmt: skip


def test_the_best_class_comes_first_and_is_asked_by_default_wherever_it_stands(sums, tmp_path):
    rewards = {"fair": 0.3, "best": 1.0, "poor": -0.5}
    weights = {"fair": 0.2, "best": 1.0, "poor": 0.05}
    conditions = {"fair": "GPT3", "best": "GPT4", "poor": "GPT2"}
    classes = {name: loss.SourceClass(conditions[name], rewards[name]) for name in rewards}
    tokenizer = data.Tokenizer(sums)
    llama = small.random_llama(vocab_size=tokenizer.vocab_size)
    small.export(llama, tokenizer, tmp_path / "model", classes=classes, weights=weights)
    talker = chat.Chat(tmp_path / "model", device="cpu")
    asked = talker.tokenizer.decode(talker.prompt([data.Message("user", "Hi")]))
    assert talker.class_name == "best" and asked.startswith("GPT4 User:")
    with served(talker) as port:
        columns = shown(request(port)[2])["columns"]
    assert [(c["name"], c["user"], c["reward"], c["weight"]) for c in columns] == [
        (name, f"{conditions[name]} User:", rewards[name], weights[name])
        for name in ("best", "fair", "poor")
    ]


def test_one_answer_at_a_time_and_the_next_question_waits(talker, port, monkeypatch):
    begun, go_on, running, together = threading.Event(), threading.Event(), [], []

    def streams(prompts, **options):
        running.append(1)
        together.append(len(running))
        yield 0, "a", None
        begun.set()
        assert go_on.wait(20)
        yield 0, "b", ""
        yield 1, "c", ""
        running.pop()

    monkeypatch.setattr(talker, "streams", streams)
    found = []
    threads = [threading.Thread(target=lambda: found.append(answers(port, HI))) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert begun.wait(20)
    time.sleep(0.2)  # the second would have begun by now
    assert request(port)[0] == 200  # the page itself is there
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [(["ab", "c"], ["", ""])] * 2 and together == [1, 1]


def test_an_answer_ends_with_its_listener(talker, port, monkeypatch):
    ended = threading.Event()

    def streams(prompts, **options):
        try:
            while True:
                yield 0, "a" * 1000, None
        finally:
            ended.set()

    with monkeypatch.context() as patch:
        patch.setattr(talker, "streams", streams)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/ask", HI, {"Origin": f"http://127.0.0.1:{port}"})
        assert connection.getresponse().read(1)
        connection.close()
        assert ended.wait(20)
    assert answers(port, HI)[0][0]


# -------------------------------------------------------------------------------- what it does not


def test_it_says_where_it_is_and_how_to_reach_it_from_another_machine(talker, capsys, monkeypatch):
    def ctrl_c(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(web.ThreadingHTTPServer, "serve_forever", ctrl_c)
    web.serve(talker, 0, OPTIONS)
    shown = capsys.readouterr().out
    port = re.search(r" at http://127\.0\.0\.1:(\d+); Ctrl-C ends\n", shown)[1]
    assert f"ssh -L {port}:127.0.0.1:{port} HOST\n" in shown


def test_it_listens_on_this_machine_alone(talker):
    with web.server_of(talker, 0, OPTIONS) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path", ["/web.html", "/config.json", "/../chat.py", "/?", "/ask", "/%2e%2e/chat.py", "*"]
)
def test_no_other_file_is_served(path, port):
    assert request(port, path=path)[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:{}", 200), ("localhost:9", 200), ("127.0.0.1", 200), ("evil.example:{}", 404),
     ("127.0.0.1.evil.example:{}", 404), ("127.0.0.2:{}", 404), (None, 404), ("", 404)],
)  # fmt: skip
def test_a_page_of_another_name_is_not_answered(host, status, port):
    """As by DNS rebinding: a name of an attacker's that comes to mean 127.0.0.1."""
    host = host and host.format(port)
    origin = f"http://{host}"
    assert request(port, Host=host)[0] == status
    status = 200 if status == 200 else 403
    assert request(port, "POST", "/ask", HI, Host=host, Origin=origin)[0] == status


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://127.0.0.1:1",
                                    "https://127.0.0.1:{}", "http://localhost:{}"])  # fmt: skip
def test_a_page_of_another_origin_may_not_ask(origin, port):
    origin = origin and origin.format(port)
    assert request(port, "POST", "/ask", HI, Origin=origin)[0] == 403


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, asked(), asked(["Hi"]), asked([], []),
        asked(["Hi"], ["Hi"], ["Hi"]), asked(["word " * 200], ["Hi"]),
        asked(["\ud800"], ["Hi"]), asked([7], ["Hi"]),
        asked([{}], [["Hi"]]),
        b'{"conversations": 7}',
        asked(["Hi", "Ho"], ["Hi"]), asked(["Hi"], ["Hi"], system=7),
        asked(["Hi"], ["Hi"], system="\ud800"), asked(["Hi"], ["Hi"], system="word " * 200),
    ],
    ids=range(19),
)  # fmt: skip
def test_what_is_no_question_is_refused_and_the_next_one_answered(body, port):
    status, _, text = request(port, "POST", "/ask", body)
    assert status == 400 and text.startswith("not asked: ")
    assert answers(port, HI)[0][0]


def test_a_browser_that_breaks_off_is_no_error(port, capsys):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(b"POST /ask HTTP/1.1\r\n")  # and then a reset
    assert answers(port, HI)[0][0]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("length", ["1048577", "-1", "x", None])
def test_a_body_of_no_sound_length_is_not_read(length, port):
    assert request(port, "POST", "/ask", HI, **{"Content-Length": length})[0] == 400


def test_the_page_loads_and_runs_only_what_stands_in_it(port):
    pages = [request(port) for _ in range(2)]
    nonces = []
    for _, headers, page in pages:
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        (nonce,) = set(re.findall(r'<(?:script|style) nonce="([\w-]{22})">', page))
        assert policy["script-src"] == policy["style-src"] == f"'nonce-{nonce}'"
        assert len(re.findall("<(?:script|style|link|img)", page)) == 2
        assert not re.search(r"https?:|innerHTML|\son\w+=", page)
        nonces.append(nonce)
    assert nonces[0] != nonces[1]


def test_the_name_of_a_class_cannot_end_the_script(talker, port, monkeypatch):
    name = "</script><script>alert(1)</script>"
    classes = {name: loss.SourceClass(name, 1.0)}
    monkeypatch.setattr(talker, "export", talker.export._replace(classes=classes))
    monkeypatch.setattr(talker, "names", [name])
    _, _, page = request(port)
    assert page.count("</script>") == 1
    assert shown(page)["columns"][0]["name"] == name


# -------------------------------------------------------------------------------------- in Chromium


@pytest.fixture
def page(port, tmp_path):
    if not browser.CHROMIUM:
        pytest.skip("no Chromium is installed")
    page = browser.Page(f"http://127.0.0.1:{port}/", tmp_path / "profile")
    yield page
    page.close()


def test_a_browser_asks_streams_stops_and_starts_again(page, talker, monkeypatch):
    go_on, questions = threading.Event(), []
    tags = "<img src=x onerror=document.title='run'><b>2 < 3</b>"

    def streams(prompts, **options):
        questions.append(talker.tokenizer.decode(prompts[1]))
        yield 0, tags, None
        yield 1, "34", ""
        for _ in range(2000):
            if go_on.wait(0.01):
                break
            yield 0, "", None  # until the listener goes
        yield 0, " end", ""

    monkeypatch.setattr(talker, "streams", streams)
    columns = "[...document.querySelectorAll('section')].map(of => of.innerText)"
    page.type("a " + tags)
    page.until(f"{columns}[1].includes(': 34')")  # while the other column still goes on
    first, second = page.run(columns)
    turn = "GPT{} User: a " + tags + "¶\n\nGPT{} Assistant: "
    assert first.split("\n\n", 1)[1] == turn.format(4, 4) + tags
    assert second.split("\n\n", 1)[1] == turn.format(3, 3) + "34¶"
    assert "¶ is <|end_of_turn|>." in page.run("document.body.innerText")
    page.run("document.querySelector('#stop').click()")
    page.until("document.querySelector('#stop').disabled")
    assert page.run(columns)[0].endswith(f"GPT4 Assistant: {tags} [stopped]")
    go_on.set()
    page.type("7")
    page.until(f"{columns}[0].endsWith(' end¶')")
    assert page.run("document.querySelectorAll('section img, section section').length") == 0
    assert page.run("document.title") == "C-RLFT: one question, every condition"
    # What was said is what the model is asked after, in each column its own.
    assert questions[1].endswith("GPT3 Assistant: 34 GPT3 User: 7 GPT3 Assistant:")
    page.run("document.querySelector('#system').value = '5'")
    page.type("8")
    page.until(f"{columns}[0].endsWith(' end¶') && {columns}[0].includes('User: 8')")
    assert questions[2].startswith("5 GPT3 User: a")
    page.run("document.querySelector('#system').value = ''")
    page.run("window.before = true, document.querySelector('#new').click()")
    page.until("!window.before && document.activeElement.id == 'question'")
    assert page.run("document.querySelectorAll('section p').length") == 0
    page.type("9")
    page.until(f"{columns}[0].endsWith(' end¶')")
    assert questions[3] == "GPT3 User: 9 GPT3 Assistant:"


@pytest.mark.parametrize("size", [(1000, 700), (390, 800)])
def test_the_question_stays_in_view_and_the_page_follows_the_answers(
    size, port, talker, tmp_path, monkeypatch
):
    if not browser.CHROMIUM:
        pytest.skip("no Chromium is installed")

    def streams(prompts, **options):
        for line in range(80):
            yield line % 2, "word " * 9, None
        yield from ((0, "end", ""), (1, "end", ""))

    monkeypatch.setattr(talker, "streams", streams)
    page = browser.Page(f"http://127.0.0.1:{port}/", tmp_path / "profile", size)
    width, height = size
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page.call("Emulation.setDeviceMetricsOverride", **screen)
    columns = "[...document.querySelectorAll('section')]"
    box = "document.querySelector('{}').getBoundingClientRect()"
    for count in range(1, 4):
        page.type("What?")
        page.until(f"{columns}.every(of => of.innerText.split('end¶').length == {count + 1})")
        assert page.run(f"{box.format('form')}.bottom <= innerHeight")
        assert page.run(f"{box.format('section p:last-child i')}.bottom") < page.run(
            f"{box.format('form')}.top"
        )
    assert page.run("innerWidth") == width  # and no wider than the screen
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    page.run("document.documentElement.scrollTop = 0")
    assert page.run(f"{box.format('form')}.bottom <= innerHeight")
    page.close()
