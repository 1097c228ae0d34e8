"""Every key of a run by section, with its default, its meaning and the values it takes: the one home of each.

`train.local-steps` names the same value in a TOML recipe, on the command line, in `flwr run --run-config`
and in `[tool.flwr.app.config]`. Flower admits only scalars, so every value is a bool, int, float or str.
docs/config.md and the Flower keys of pyproject.toml are written from this file.
"""

from dataclasses import dataclass

from fedllm.config.key import key

MILLION = 1_000_000  # bounds counts that no run reaches, so that a slip of the pen is refused
# name -> (train, read-out, weighting, where the method is published)
PRESETS: dict[str, tuple[str, str, str, str]] = {
    "fedit": ("both", "factor-mean", "", "arXiv 2305.05644"),
    "ffa": ("b", "factor-mean", "", "FFA-LoRA, arXiv 2403.12313"),
    "rolora": ("alternate", "factor-mean", "", "arXiv 2502.01755"),
    "flexlora": ("both", "svd", "", "arXiv 2402.11505"),
    "fedex": ("both", "residual", "", "FedEx-LoRA, arXiv 2410.09432"),
    "flora": ("both", "stack", "", "arXiv 2409.05976"),
    "lora-fair": ("both", "projection", "", "arXiv 2411.14961, in closed form"),
    "fedsa": ("both", "local-b", "", "FedSA-LoRA, arXiv 2410.01463"),
    "hetlora": ("both", "factor-mean", "product-norm", "arXiv 2401.06432"),
}


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run itself: its folder and whether it continues an earlier one."""

    # What a resumed run may change says where, how long or how loudly it works, never what a round computes.
    name: str = key("run", "name of the run and of its folder", resumable=True)
    output: str = key("", "folder that holds run folders; empty = ./runs", resumable=True)
    resume: bool = key(False, "continue the run of this name after its last complete round", resumable=True)
    purpose: str = key("", "what the adapter is for, in a word that a site may allow")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model, and how this machine holds it."""

    name: str = key("smollm2-135m-instruct", "alias, hub id (`ID@REVISION`), local folder or .gguf file")
    dtype: str = key(
        "auto",
        "type of the weights; auto = bfloat16 on a GPU and on a CPU that is faster in it, else float32",
        words="auto float32 bfloat16 float16 float64",
    )
    # Another machine may go on with a run: only rounding differs.
    device: str = key("auto", "device of torch; auto = cuda where there is one, else cpu", resumable=True)
    quantization: str = key("none", "bits of the frozen weights (bitsandbytes, GPU)", words="none 8bit 4bit")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass, to save memory")
    num_threads: int | str = key(
        "auto",
        "CPU threads; auto = torch's own number",
        words="auto",
        at_least=1,
        at_most=1024,
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The LoRA adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = key(8, "rank R of the factors A [R, in] and B [out, R]", at_least=1, at_most=4096)
    alpha: float = key(16.0, "the product B A is scaled by alpha / rank", above=0)
    target_modules: str = key("all-linear", 'layers such as "q_proj,v_proj"; all-linear = all but the head')
    init_a: str = key(
        "auto",
        "rows of A at the start: uniform or orthonormal; auto = orthonormal under privacy, else kaiming",
        words="auto kaiming orthonormal",
    )
    client_ranks: str = key(
        "", 'ranks of clients, dealt in turn ("4,8,16") or by name ("anna:4,ben:8"); empty = lora.rank'
    )
    # At 1 nothing would be left to scale up.
    dropout: float = key(0.0, "share of an adapter's inputs that training drops", at_least=0, at_most=0.99)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The private text, and how it becomes one data set for each client."""

    source: str = key("docstrings", "docstrings, a hub id, a local path, a glob, or paths parted by commas")
    split: str = key("train", "split of a hub data set")
    partition: str = key("column:client", "column:NAME, iid, dirichlet:NAME:ALPHA or quantity:SKEW")
    columns: str = key("", '"prompt=NAME,response=NAME" or "text=NAME"; empty = columns of the usual names')
    on_bad_row: str = key("skip", "what to do at a row that cannot be used", words="skip stop")
    # Something must be left to train on.
    held_out_fraction: float = key(0.1, "share of a client's rows for evaluation", at_least=0, at_most=0.9)
    max_held_out: int = key(64, "most rows that a client keeps for evaluation", at_least=0)
    max_rows: int | str = key("all", "most rows of a client, held-out ones included", words="all", at_least=1)
    licences: str = key(
        "", 'SPDX licences of a column `licence` that rows may have, such as "MIT,Apache-2.0"; empty = any'
    )


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who takes part, and when a round closes."""

    num_clients: int = key(8, "clients of the federation, who share data.source", at_least=1, at_most=MILLION)
    num_rounds: int = key(3, "rounds of the run", at_least=1, at_most=MILLION, resumable=True)
    # Tried in this order: 5 is a number of clients, 0.5 a share of them.
    cohort: int | float | str = key(
        "all", "clients of a round: a number, or a share such as 0.1", words="all", above=0, at_most=MILLION
    )
    selection: str = key(
        "uniform",
        "how a round's clients are chosen: alike, by rows, a coin for each, the highest losses of CANDIDATES"
        " (else twice the cohort), or by utility, those slower than SECONDS less often (docs/non-iid.md)",
        words="uniform weighted poisson power-of-choice[:CANDIDATES] oort[:SECONDS]",
        above=0,  # the number after the colon
    )
    # 1.3 in production, where many drop out (Bonawitz et al. 2019, arXiv 1902.01046).
    over_selection: float = key(
        1.0, "ask this many times the cohort and keep the first to answer", at_least=1, at_most=10
    )
    max_staleness: int = key(0, "rounds that an update may be late and still count", at_least=0, at_most=1000)
    min_clients: int = key(1, "fewest updates with which a round counts", at_least=1, at_most=MILLION)
    round_deadline: float | str = key(
        "auto",
        "seconds that a round waits for replies; auto = 600, and in a deployment twice the median time of its"
        " nodes once they have answered, or more for slower ones, from 60 to 3,600",
        words="auto",
        above=0,
        resumable=True,
    )
    join_deadline: float = key(120.0, "seconds to wait for nodes to answer at all", above=0, resumable=True)
    sites: str = key(
        "", "the server's list of admitted sites, a TOML file (docs/identity.md); empty = any", resumable=True
    )
    max_retries: int = key(2, "further attempts at a failed round", at_least=0, at_most=1000, resumable=True)
    max_failure_rate: float = key(
        0.5,
        "share of a round's clients that may fail; three rounds in a row above it end the run",
        at_least=0,
        at_most=1,
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One client's local training in one round, with AdamW."""

    local_steps: int = key(4, "optimizer steps of a client in a round", at_least=1, at_most=MILLION)
    batch_size: int = key(4, "rows of one step", at_least=1, at_most=MILLION)
    learning_rate: float = key(1e-3, "learning rate", above=0)
    schedule: str = key("constant", "course of the learning rate over the rounds", words="constant cosine")
    weight_decay: float = key(0.0, "weight decay", at_least=0)
    # SCAFFOLD needs one: it bounds what a client may add to the control variates.
    clip_norm: float | str = key(1.0, "largest norm of a step's gradient", words="off", above=0)
    # Many pairs of A and B have one product, which is what the layers compute.
    proximal: float | str = key(
        0.0,
        "FedProx: strength of the pull to the round's start, of A and B, or of their product",
        words="product:MU",
        at_least=0,
    )
    control_variates: bool = key(False, "SCAFFOLD (experimental)")
    # A prompt, an answer and the end token have room in 8.
    max_length: int = key(256, "most tokens of a row", at_least=8, at_most=10 * MILLION)
    token_budget: int | str = key(
        "auto", "tokens of one pass; 1 = each client alone", words="auto", at_least=1, at_most=100 * MILLION
    )


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """How client updates become one adapter: train, read-out and weighting, or a preset in their place."""

    preset: str = key("", "a published method; empty = none", words=" ".join(PRESETS))
    train: str = key("both", "factors trained and sent; alternate = B, then A", words="both a b alternate")
    read_out: str = key(
        "svd",
        "svd = best rank-R form of the exact mean; factor-mean = mean of A and mean of B; residual = that,"
        " and the base model gains what it loses; stack = the base model gains the whole mean; projection ="
        " mean of A and the best B for it; local-b = mean of A, and every client keeps its own B",
        words="svd factor-mean residual stack projection local-b",
    )
    weighting: str = key(
        "examples",
        "weight of a client: its rows, its learnt tokens of a round, 1, or the norm of its product B A",
        words="examples tokens uniform product-norm",
    )
    robust: str = key(
        "none",
        "defence against outlying updates; SHARE (else 0.2) of a round's clients is assumed malicious",
        words="none norm-clip multi-krum[:SHARE] geometric-median similarity trimmed-mean[:SHARE]"
        " coordinate-median",
        at_least=0,
        at_most=0.5,  # no rule can tell a majority of attackers from honest clients
    )
    optimizer: str = key(
        "fedavg",
        "server optimizer; its constants where not the published ones: learning-rate (all), momentum (all but"
        " fedavg), adaptivity (fedadam, fedyogi, fedadagrad), second-moment (fedadam, fedyogi)",
        words="fedavg[:NAME=NUMBER] fedavgm[:NAME=NUMBER] nesterov[:NAME=NUMBER] fedadam[:NAME=NUMBER]"
        " fedyogi[:NAME=NUMBER] fedadagrad[:NAME=NUMBER]",
    )


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy; `privacy.epsilon` alone turns it on (docs/privacy.md)."""

    epsilon: float | str = key(
        "off", "privacy budget of the whole run", words="off", above=0, at_most=MILLION
    )
    delta: float = key(1e-5, "chance that epsilon fails; below 1 / number of units", above=0, at_most=0.5)
    unit: str = key("example", "what is hidden: one row, or all of a client", words="example client")
    trust: str = key(
        "auto",
        "who adds noise: the server or each client; auto = central for unit client, else local",
        words="auto central local distributed",
    )
    # `adaptive` follows arXiv 1905.03871.
    clip: float | str = key(
        1.0,
        "norm C that bounds an update or a row's gradient; adaptive = the median, from START (else 1) on",
        words="adaptive[:START]",
        above=0,
    )
    noise_multiplier: float | str = key(
        "auto",
        "z: deviation of the noise over the clip; auto = the least that epsilon allows",
        words="auto",
        above=0,
        at_most=MILLION,
    )
    max_participations: int | str = key(
        "all", "most rounds of one client", words="all", at_least=1, at_most=MILLION
    )
    weight_cap: float | str = key("off", "rows from which a client counts fully", words="off", above=0)
    # A mean loss of a few rows tells something of each.
    metrics: str = key(
        "auto",
        "what leaves a client besides its update: nothing, held-out losses, or training losses too; auto ="
        " held-out for unit example, else withheld",
        words="auto withheld held-out all",
    )


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Canaries: texts of random tokens among the clients' rows, to audit the run (docs/audit.md)."""

    # A coin for each decides whether it is trained on; the others are what a guess is compared with.
    canaries: int | str = key(
        0,
        "texts of 16 tokens that each client draws; it trains on about half, once, or as often as is dealt in"
        ' turn: "60:1,4,16"',
        at_least=0,
        at_most=100_000,
    )


@dataclass(frozen=True, kw_only=True)
class PersonalConfig:
    """A client's own adapter; it never leaves the client."""

    mode: str = key(
        "none",
        "finetune = after the last round each client trains the shared adapter on, as long as its held-out"
        " rows say, at a learning rate of NUMBER (else that of the first round); dual = an adapter of rank R"
        " (else 4) on top of the shared one, trained in each round; ditto = the same, pulled to it by MU"
        " (else 0.1)",
        words="none finetune[:NUMBER] dual[:rank=R] ditto[:rank=R,pull=MU]",
        above=0,
    )
    steps: int = key(
        4, "optimizer steps: in each round (dual, ditto), or at most (finetune)", at_least=1, at_most=MILLION
    )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation of the clients' adapters into the aggregated one, on the server."""

    when: str = key("never", "after which rounds", words="never last every")
    teacher: str = key(
        "posterior",
        "posterior = clients weighted by how well they predict a text, tempered by TEMPER (else 1);"
        " uniform = all alike; logit-mean = FedDF",
        words="posterior[:TEMPER] uniform logit-mean",
        at_least=0,
        at_most=100,
    )
    text: str = key("synthetic", 'synthetic, public text as in data.source, or "synthetic+SOURCE"')
    num_texts: int = key(64, "texts to distil on; 1/4 more are held out", at_least=2, at_most=10 * MILLION)
    max_tokens: int = key(128, "most tokens of a text", at_least=8, at_most=10 * MILLION)
    steps: int = key(50, "optimizer steps of the student", at_least=1, at_most=MILLION)
    batch_size: int = key(8, "texts of a step", at_least=1, at_most=MILLION)
    learning_rate: float = key(5e-4, "learning rate of the student", above=0)
    # The rest of the vocabulary is one bucket.
    top_k: int = key(64, "likeliest tokens kept one by one in a target", at_least=1, at_most=MILLION)
    # The server keeps an adapter for each, 4 bytes a value.
    max_teachers: int = key(8, "most clients that teach, the heaviest", at_least=1, at_most=100_000)
    originality: str = key("auto", "screen texts for copies; auto = without privacy", words="auto on off")
    licence: str = key("", "licence of the synthetic texts, in your words")
    control: bool = key(False, "also fine-tune on the same texts, for comparison")
    gate: str = key(
        "auto",
        "losses that must not worsen: of held-out texts (public), of clients' held-out rows too (clients);"
        " auto = clients where such losses may leave",
        words="auto public clients",
    )


@dataclass(frozen=True, kw_only=True)
class SecureConfig:
    """Secret sums: the server learns the sum of a round's updates and no single one of them."""

    method: str = key(
        "none",
        "masks = clients' masks cancel in the sum; shares = clients sum shares, the server only passes them"
        " on; he = homomorphic encryption, one client holds the key",
        words="none masks shares he",
    )
    min_parties: int = key(3, "fewest clients whose sum is formed", at_least=3, at_most=MILLION)


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """How an update travels."""

    codec: str = key("bf16", "4, 2 or 1 + 2/64 bytes a value", words="fp32 bf16 int8")
    node_sum: bool = key(False, "a node sends the weighted mean of its clients' updates, not each of them")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured besides the training loss."""

    every: int | str = key(
        "ends",
        "held-out loss after every so many rounds; ends = before the first and after the last; train = after"
        " each, of the clients of the next round: they measure it before they train, without a message more;"
        " only = of the adapter that the run starts from, and no round is done",
        words="ends train only",
        at_least=1,
        at_most=MILLION,
        resumable=True,
    )
    prompts: str = key(
        "",
        'public prompts answered before and after, parted by " || "',
        resumable=True,
        separator=" || ",
    )
    max_new_tokens: int = key(24, "most tokens of an answer", at_least=0, at_most=100_000, resumable=True)


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where the server sends the figures of each round, besides the run folder (docs/tracking.md)."""

    to: str = key(
        "",
        "trackers of the run, each a package of its own",
        words="tensorboard mlflow wandb trackio",
        resumable=True,
        is_list=True,
    )
