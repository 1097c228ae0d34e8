"""Every key of a run, with its default, meaning and range: the one home of each.

`train.local-steps` names the same value in a TOML recipe, on the command line, in `flwr run --run-config`
and in `[tool.flwr.app.config]`. Flower admits only scalars, so every leaf is a bool, int, float or str.
docs/config.md and the Flower keys of pyproject.toml are written from this file.
"""

from dataclasses import dataclass

from fedllm.config.key import key

UNITS = ("example", "client")
TRUSTS = ("auto", "central", "local", "distributed")
METRICS = ("auto", "withheld", "held-out", "all")
TRAINED = ("both", "a", "b", "alternate")
READ_OUTS = ("svd", "factor-mean", "residual", "stack", "projection", "local-b")
WEIGHTINGS = ("examples", "tokens", "uniform", "product-norm")
ROBUST_RULES = (
    "none",
    "norm-clip",
    "multi-krum",
    "geometric-median",
    "similarity",
    "trimmed-mean",
    "coordinate-median",
)
OPTIMIZERS = ("fedavg", "fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad")
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

    name: str = key("run", "name of the run and of its folder")
    output: str = key("", "folder that holds run folders; empty = ./runs")
    resume: bool = key(False, "continue the run of this name after its last complete round")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which frozen base model, and how this machine holds it."""

    name: str = key("smollm2-135m-instruct", "alias, hub id, local folder or .gguf file")
    revision: str = key("", "hub revision; empty = the default branch")
    dtype: str = key(
        "auto",
        "auto = float32 on CPU, bfloat16 on GPU",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
    )
    device: str = key("auto", "auto = cuda where present, else cpu")
    quantization: str = key(
        "none", "bits of the frozen weights; bitsandbytes, GPU", choices=("none", "8bit", "4bit")
    )
    gradient_checkpointing: bool = key(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    num_threads: int = key(0, "CPU threads of torch; 0 = torch's own choice", at_least=0, at_most=1024)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter's numbers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = key(8, "rank R of the factors A [R, in] and B [out, R]", at_least=1, at_most=4096)
    alpha: float = key(16.0, "the product B A is scaled by alpha / rank", above=0)
    target_modules: str = key(
        "all-linear",
        'all-linear = every linear layer but the output head; or a comma-separated list: "q_proj,v_proj"',
    )
    init_a: str = key(
        "auto",
        "how A is drawn from the seed: uniform, or rows at right angles (FedSVD under plain SGD); auto = kaiming, orthonormal under privacy",
        choices=("auto", "kaiming", "orthonormal"),
    )
    client_ranks: str = key(
        "",
        'ranks of the clients; empty = lora.rank; "4,8,16" dealt in turn over sorted client ids; "anna:4,ben:8"',
    )
    dropout: float = key(
        0.0,
        "share of the adapters' inputs dropped while training, drawn per row; share of the adapters' inputs dropped while training",
        at_least=0,
        at_most=0.99,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where private text is and how it becomes one shard per client."""

    source: str = key("docstrings", "docstrings | hub id | local path, glob or comma-separated paths")
    split: str = key("train", "split of a hub data set")
    partition: str = key("column:client", "column:NAME | iid | dirichlet:NAME:ALPHA | quantity:SKEW")
    prompt_column: str = key("", "column of the prompt; empty = detected by its usual names")
    response_column: str = key("", "column of the answer; empty = detected")
    text_column: str = key("", "column of plain text, learnt whole; empty = detected")
    on_bad_row: str = key(
        "skip", "leave out a row that cannot be used, or end there", choices=("skip", "stop")
    )
    held_out_fraction: float = key(
        0.1, "share of a client's rows kept for evaluation", at_least=0, at_most=0.9
    )
    max_held_out: int = key(64, "rows of that share at most", at_least=0)
    max_rows: int = key(0, "rows of a client at most, before the split; 0 = all", at_least=0)


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who takes part, and when a round closes."""

    num_clients: int = key(
        8, "clients the run waits for and deals its source to", at_least=1, at_most=1_000_000
    )
    num_rounds: int = key(3, "rounds of the run", at_least=1, at_most=1_000_000)
    cohort_size: int = key(0, "clients of a round; 0 = cohort-fraction of all", at_least=0, at_most=1_000_000)
    cohort_fraction: float = key(
        1.0, "share of all clients that a round trains, where cohort-size is 0", above=0, at_most=1
    )
    selection: str = key(
        "uniform",
        "whom a round asks: all alike, by their rows, each by its own coin, the worst known losses of some candidates, or by utility (strategies/cohort/selection.py)",
        choices=("uniform", "weighted", "poisson", "power-of-choice", "oort"),
    )
    candidates: int = key(
        0, "clients power-of-choice draws first; 0 = twice the cohort", at_least=0, at_most=1_000_000
    )
    preferred_seconds: float = key(
        0.0, "of training, above which oort counts a client less; 0 = no matter", at_least=0
    )
    over_selection: float = key(
        1.0, "ask this many times the cohort and keep the first to answer", at_least=1, at_most=10
    )
    max_staleness: int = key(
        0, "rounds by which an update may come late and still count; 0 = none", at_least=0, at_most=1000
    )
    min_clients: int = key(
        1,
        "updates a round needs; fewer accepted updates leave the model unchanged",
        at_least=1,
        at_most=1_000_000,
    )
    round_deadline: float = key(600.0, "longest time a round waits for replies; seconds", above=0)
    join_deadline: float = key(120.0, "seconds to wait for nodes to appear and answer", above=0)
    max_retries: int = key(2, "attempts after a round's first", at_least=0, at_most=1000)
    max_failure_rate: float = key(
        0.5,
        "share of a round's clients that may fail; three rounds in a row above it end the run",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One client's local training in one round."""

    local_steps: int = key(4, "optimizer steps of a client in a round", at_least=1, at_most=1_000_000)
    batch_size: int = key(4, "rows of one step", at_least=1, at_most=1_000_000)
    learning_rate: float = key(1e-3, "of AdamW", above=0)
    schedule: str = key(
        "constant",
        "the same learning rate in every round, or half a cosine over the rounds",
        choices=("constant", "cosine"),
    )
    weight_decay: float = key(0.0, "of AdamW", at_least=0)
    clip_norm: float = key(1.0, "largest norm of a client's whole gradient; 0 = off", at_least=0)
    proximal: float = key(0.0, "strength mu of the pull back to where the round began; 0 = off", at_least=0)
    proximal_space: str = key(
        "factor",
        "pull the factors A and B, or their product, which has one form only",
        choices=("factor", "product"),
    )
    control_variates: bool = key(False, "SCAFFOLD; experimental")
    max_length: int = key(256, "most tokens of a row", at_least=8, at_most=10_000_000)
    token_budget: int = key(
        0,
        "tokens of one pass: clients are fused up to it; 0 = automatic, 1 = each alone",
        at_least=0,
        at_most=100_000_000,
    )


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """How client updates become one adapter: a point of the grid in fedllm/plan/aggregation.py."""

    preset: str = key(
        "",
        "a published method, in place of train, read-out and weighting; empty = as they are",
        choices=("", *PRESETS),
    )
    train: str = key(
        "both", "the factor that clients train and send; b in odd rounds, a in even ones", choices=TRAINED
    )
    read_out: str = key(
        "svd",
        "svd = best rank-R form of the exact mean; factor-mean = mean of A and mean of B; projection = mean of A and the best B for it; residual = factor-mean, and the base model gains what it loses; stack = the base model gains the whole mean; local-b = mean of A, every client keeps its own B",
        choices=READ_OUTS,
    )
    weighting: str = key(
        "examples",
        "what a client counts: its training rows, its learnt tokens of a round, 1, or the norm of its product B A",
        choices=WEIGHTINGS,
    )
    robust: str = key(
        "none",
        "what is left to a client whose update stands out; the last two need aggregation.train other than both",
        choices=ROBUST_RULES,
    )
    max_malicious: float = key(
        0.2,
        "assumed share of a round's clients: multi-krum and trimmed-mean leave out as many",
        at_least=0,
        at_most=0.5,
    )
    optimizer: str = key("fedavg", "what the server does with a round's change", choices=OPTIMIZERS)
    server_learning_rate: float = key(
        0.0,
        "of the server optimizer; 0 = the optimizer's own: 1, nesterov 0.7, adaptive ones 0.001",
        at_least=0,
    )
    server_momentum: float = key(
        0.9,
        "share of the earlier rounds' direction that is kept; of every optimizer but fedavg",
        at_least=0,
        at_most=0.9999,
    )
    second_moment: float = key(
        0.99,
        "share of the earlier rounds' squares that is kept, of fedadam and fedyogi",
        at_least=0,
        at_most=0.9999,
    )
    adaptivity: float = key(
        1e-4, "tau of the adaptive optimizers: the size of an adapter value's change", above=0
    )
    staleness_exponent: float = key(
        0.5, "a late update weighs 1 / (1 + rounds late)^this", at_least=0, at_most=100
    )


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy; `privacy.epsilon` alone turns it on (docs/privacy.md)."""

    epsilon: float = key(
        0.0, "budget budget of the run; 0 = no differential privacy", at_least=0, at_most=1_000_000
    )
    delta: float = key(
        1e-5,
        "probability with which the bound may fail; well below 1 / number of units",
        above=0,
        at_most=0.5,
    )
    unit: str = key("example", "what is hidden: one row of a client, or all a client sends", choices=UNITS)
    trust: str = key(
        "auto",
        "who adds the noise: the server or each client; auto: central for clients, else local",
        choices=TRUSTS,
    )
    clip: float = key(1.0, "C: largest norm of a client's update, or of one row's gradient", above=0)
    adaptive_clip: bool = key(False, "follow the median norm of the clients' updates, from clip on")
    noise_multiplier: float = key(
        0.0,
        "z: deviation of the noise over the clip; 0 = the least that epsilon allows",
        at_least=0,
        at_most=1_000_000,
    )
    max_participations: int = key(
        0, "rounds that a client takes part in at most; 0 = all", at_least=0, at_most=1_000_000
    )
    weight_cap: float = key(0.0, "rows from which a client counts fully; 0 = no weights by rows", at_least=0)
    metrics: str = key(
        "auto",
        "what leaves a client besides its delta: nothing, held-out losses, or training numbers too; what leaves is named in privacy.json; auto = held-out for examples, else withheld",
        choices=METRICS,
    )


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What a run plants for its own audit (docs/audit.md): texts of random tokens among clients' rows."""

    canaries: int = key(
        0,
        "texts a client draws; each is put among its rows by its own fair coin",
        at_least=0,
        at_most=100_000,
    )
    canary_tokens: int = key(16, "length of one", at_least=2, at_most=10_000_000)
    canary_repeats: str = key("1", 'how often one stands among the rows; "1,4,16" dealt in turn')


@dataclass(frozen=True, kw_only=True)
class PersonalConfig:
    """An adapter of a client's own on top of the shared one; it never leaves the client."""

    mode: str = key(
        "none",
        "dual = shared and personal adapter add up; ditto = the same, pulled to the shared one",
        choices=("none", "dual", "ditto"),
    )
    rank: int = key(4, "rank of the personal adapter", at_least=1, at_most=4096)
    steps: int = key(4, "optimizer steps of it after a client's round", at_least=1, at_most=1_000_000)
    pull: float = key(0.1, "ditto: strength of the pull back to the shared adapter", at_least=0)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The clients' adapters taught back into the aggregated one, at the server."""

    when: str = key(
        "never", "in no round, after the last or after every one", choices=("never", "last", "every")
    )
    teacher: str = key(
        "posterior",
        "posterior = the mixture of the clients' models, each weighed by how well it foretold the text so far; uniform = all alike; logit-mean = FedDF",
        choices=("posterior", "uniform", "logit-mean"),
    )
    text: str = key("synthetic", 'synthetic | public text as in data.source | both: "synthetic+SOURCE"')
    num_texts: int = key(
        64, "texts to distil on; a quarter as many more are held out", at_least=2, at_most=10_000_000
    )
    max_tokens: int = key(128, "of a text", at_least=8, at_most=10_000_000)
    steps: int = key(50, "optimizer steps of the student", at_least=1, at_most=1_000_000)
    batch_size: int = key(8, "texts of a step", at_least=1, at_most=1_000_000)
    learning_rate: float = key(5e-4, "of AdamW", above=0)
    top_k: int = key(
        64, "tokens of a prediction whose probability is kept one by one", at_least=1, at_most=1_000_000
    )
    temper: float = key(
        1.0, "beta of the posterior: below 1 a client's own certainty counts less", at_least=0, at_most=100
    )
    pull: float = key(0.0, "strength mu of the pull back to the aggregate; 0 = off", at_least=0)
    max_teachers: int = key(
        8, "the heaviest clients of the round; memory grows with them", at_least=1, at_most=100_000
    )
    originality: str = key(
        "auto", "screen synthetic texts (auto = without privacy.epsilon)", choices=("auto", "on", "off")
    )
    licence: str = key("", "of synthetic text, in your words; stands in synthetic.json")
    control: bool = key(False, "also fine-tune on the same texts, to compare with")
    gate: str = key(
        "auto",
        "what must improve for a step to be kept: public = the loss on held-out texts; clients = besides that, the clients' own held-out loss must not worsen; auto = clients where there is no public text and held-out losses may leave",
        choices=("auto", "public", "clients"),
    )


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """How a delta travels."""

    codec: str = key("bf16", "4, 2 or 1 + 2/64 bytes a value", choices=("fp32", "bf16", "int8"))
    node_sum: bool = key(
        False,
        "one packet up for each node; a node returns the weighted mean of its clients' deltas in place of each delta",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured besides the training loss."""

    every: int = key(
        0,
        "held-out loss every so many rounds; 0 = before the first and after the last",
        at_least=0,
        at_most=1_000_000,
    )
    prompts: str = key("", 'public prompts answered before and after, separated by " || "')
    max_new_tokens: int = key(24, "length of an answer at most", at_least=0, at_most=100_000)
