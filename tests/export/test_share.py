"""What is said about a run and what is sent: the card from the record, the push that shows, refuses and stays private."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import OVERRIDES, ROOT
from huggingface_hub import ModelCard, constants

from medibot.errors import RecipeError
from medibot.evaluation.evaluate import evaluate
from medibot.export.card import without_folders, write_cards
from medibot.export.push import push
from medibot.recipe import load_recipe
from medibot.run import open_run, read_json
from medibot.training.session import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    """An evaluated run whose base states its licence, with its card."""
    folder = tmp_path_factory.mktemp("share")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIBOT_OUTPUTS", str(folder / "outputs"))
        patch.setenv("MEDIBOT_CACHE", str(folder / "cache"))
        base = make_model("smollm2")
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        chosen = [f"model.pretrained_model_name_or_path={base}", "lora=null", "quantization=null"]
        train(load_recipe("quickstart", [*chosen, *OVERRIDES], root=ROOT), "mine")
        evaluate("mine", rows=6)
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        write_cards("mine", folder / "card.html")
        (base / "README.md").unlink()
        yield open_run("mine")


def test_front_matter_is_what_the_hub_reads(run):
    data = ModelCard.load(run.weights / "README.md").data
    found = (data.license, data.language, data.library_name, data.pipeline_tag)
    assert found == ("apache-2.0", "en", "transformers", "text-generation")
    assert "medibot" in data.tags
    # A local folder or file is no name on the hub
    assert data.base_model is None and data.datasets is None
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    results = read_json(run.folder / "eval" / "results.json")
    assert measured == {name: metric["value"] for name, metric in results["metrics"].items()}


def test_card_says_data_split_leaks_metrics_limits_and_recipe(run):
    text = (run.weights / "README.md").read_text()
    results, recipe = read_json(run.folder / "eval" / "results.json"), load_recipe(str(run.recipe))
    ledger = read_json(run.folder / "ledger.json")
    for line in ledger["ledger"]:
        assert f"| {line['rule']} | {line['rows_in']} | {line['dropped']} |" in text
    assert results["verdict"] in text and "quick look" in text and "Emissions: not measured" in text
    nll = results["metrics"]["nll"]
    assert f"{nll['low']:+.4f} to {nll['high']:+.4f}" in text
    assert recipe.data.license in text and recipe.data.attribution in text
    assert read_json(run.folder / "split.json")["fingerprint"][:16] in text
    for said in ("Not a medical device", "## Limits", "## Recipe", "torch ", "transformers "):
        assert said in text


def test_card_tells_no_folder_of_this_machine(run):
    text = (run.weights / "README.md").read_text()
    paths = re.findall(r"(?<![\w.:<])/(?:tmp|home|root|work|usr|Users)/\S*", text)
    assert paths == [] and str(ROOT) not in text
    assert without_folders({"a": ["/home/me/x.parquet", "lavita/MedQuAD", 3]}) == {
        "a": ["x.parquet", "lavita/MedQuAD", 3]
    }


def test_page_shows_what_the_card_says_and_runs_nothing(run):
    page = (run.folder.parent.parent / "card.html").read_text()
    assert "<h1>mine</h1>" in page and "license: apache-2.0" in page and page.count("<table>") >= 3
    assert "<script" not in page and not re.findall(
        r"""(?:src|href|@import|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", page
    )


class Hub(BaseHTTPRequestHandler):
    """The hub's answers to a push, as huggingface_hub asks for them; keeps what it was sent."""

    private = True
    asked: list[str]
    created: list[dict]
    received: dict[str, bytes]

    def do_POST(self):
        body = self.body()
        self.asked.append(self.path)
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.say({"url": f"http://{self.headers['Host']}/me/mine"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.say({"files": [file | {"shouldIgnore": False} for file in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.say({"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1" * 40})

    def body(self):
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        self.asked.append(self.path)
        self.say({"id": "me/mine", "private": self.private, "sha": "1" * 40, "siblings": []})

    def say(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the hub on this machine, which huggingface_hub's own code talks to."""
    handler = type("ThisHub", (Hub,), {"asked": [], "created": [], "received": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_notatoken")
    yield handler
    server.shutdown()


def test_push_shows_what_would_go_out_and_sends_nothing(run, hub):
    said = push("mine", "me/mine")
    assert "-> me/mine (private)" in said and "nothing was sent" in said
    for name in ("README.md", "model.safetensors", "tokenizer.json", "kept back: training_args.bin", "apache-2.0"):
        assert name in said
    assert hub.asked == []


def test_push_sends_the_folder_into_a_private_repository(run, hub):
    said = push("mine", "me/mine", yes=True)
    assert hub.created[0]["visibility"] == "private"
    expected = {file.name for file in run.weights.iterdir()} - {"training_args.bin"}
    assert set(hub.received) == expected
    for name, content in hub.received.items():
        assert content == (run.weights / name).read_bytes(), name
    assert "sent: http" in said


def test_public_is_only_what_was_asked_for(run, hub):
    push("mine", "me/mine", public=True, yes=True)
    assert hub.created[0]["visibility"] == "public" and hub.received
    hub.received.clear()
    hub.private = False
    with pytest.raises(RecipeError, match="me/mine is public"):
        push("mine", "me/mine", yes=True)
    assert hub.received == {}


def test_hub_that_does_not_answer_is_one_line(run, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RecipeError, match="the hub") as caught:
        push("mine", "me/mine", yes=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("repo", ["", "mine", "a/b/c", "me/ mine", "../x"])
def test_target_that_is_no_repository_is_refused(run, repo):
    with pytest.raises(RecipeError, match="write owner/name"):
        push("mine", repo)


@pytest.mark.parametrize(
    ("what", "said"), [("gguf", "make export-gguf"), ("merged", "make merge"), ("all", "there are")]
)
def test_folder_that_is_not_there_is_refused(run, what, said):
    with pytest.raises(RecipeError, match=said):
        push("mine", "me/mine", what)


def test_push_without_card_or_licence_is_refused(run, hub):
    file, recipe = run.weights / "README.md", run.recipe
    written, whole = file.read_text(), recipe.read_text()
    try:
        # What upstream leaves there when it saves
        file.write_text("---\nlibrary_name: peft\ntags:\n- sft\n---\n\n# Model Card for Model ID\n")
        with pytest.raises(RecipeError, match=r"no model card .*make card"):
            push("mine", "me/mine", yes=True)
        file.write_text(written.replace("license: apache-2.0", "license: unknown"))
        with pytest.raises(RecipeError, match="base model's licence"):
            push("mine", "me/mine", yes=True)
        file.write_text(written)
        recipe.write_text(re.sub(r"\n  license: .*", "", whole))
        with pytest.raises(RecipeError, match=r"licence of recipes/data|licence of /"):
            push("mine", "me/mine", yes=True)
        recipe.write_text(
            re.sub(r"\n  attribution: .*(\n    .*)*", "", whole.replace("license: apache-2.0", "license: cc-by-4.0"))
        )
        with pytest.raises(RecipeError, match="names of the data's authors"):
            push("mine", "me/mine", yes=True)
    finally:
        file.write_text(written)
        recipe.write_text(whole)
    assert hub.asked == []
