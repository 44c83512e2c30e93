"""The shapes of JSON answers and request bodies; the schema and the docs come from them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from actstore.query.inventory import LatentSetInfo, LocationInfo
from actstore.query.results import Certificate

__all__ = [
    "ApiIndex",
    "ColumnModel",
    "ComparisonModel",
    "ExampleModel",
    "ExamplesModel",
    "ExplanationModel",
    "HistogramModel",
    "LocationsModel",
    "NeuronModel",
    "NodeModel",
    "NodeVectorsModel",
    "Problem",
    "ProblemPart",
    "PromptModel",
    "PromptRequest",
    "ScalarModel",
    "ScalarsModel",
    "SequenceModel",
    "SqlModel",
    "SqlRequest",
    "StatisticsModel",
    "StoreModel",
    "TableModel",
    "TensorModel",
    "TokenScoreModel",
    "TopKModel",
    "TopNodesModel",
    "UnitModel",
]

SmallIndex = Annotated[int, Field(ge=0, le=2**31 - 1)]
Numbers = list[Any]
"""Numbers nested as the shape says; null where JSON has no number."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProblemPart(_Model):
    """One thing that is wrong with a request."""

    where: list[str]
    message: str


class Problem(_Model):
    """What went wrong (RFC 9457); programs look at `kind`."""

    type: str
    title: str
    status: int
    detail: str
    kind: str
    errors: list[ProblemPart] | None = None


class ApiIndex(_Model):
    """Where everything is."""

    version: str = Field(description="of actstore")
    resources: dict[str, str] = Field(description="name -> path")


class LocationsModel(_Model):
    """Every location of the forward pass, and every stored gradient."""

    locations: list[LocationInfo]


class StoreModel(_Model):
    """What the store holds."""

    id: str
    state: str = Field(description="changes whenever any answer may")
    format: int
    model: str
    architecture: str
    layers: int
    dimensions: dict[str, Any]
    tokenizer: dict[str, Any]
    tokens: int
    tokens_planned: int
    sequences: int
    documents: int
    segments_committed: int
    segments_planned: int
    segment_rows: int
    missing: list[tuple[int, int]]
    coverage: dict[str, int]
    objectives: dict[str, str]
    latents: dict[str, LatentSetInfo]
    locations: dict[str, LocationInfo]
    prompts: bool = Field(description="whether /prompt answers")


class ColumnModel(_Model):
    """A column of a table."""

    name: str
    type: str


class TableModel(_Model):
    """A page of a table."""

    columns: list[ColumnModel]
    rows: list[dict[str, Any]]
    next: str | None = Field(description="cursor of the next page; null at the end")


class UnitModel(_Model):
    """A neuron, head or latent: its row, and where more of it is."""

    row: dict[str, Any]
    links: dict[str, str]


class BracketModel(_Model):
    """A number that is not known exactly, and what it is not outside of."""

    estimate: float | None
    low: float | None
    high: float | None


class BinModel(_Model):
    """How many values lie from `low` to `high`."""

    low: float | None = Field(description="least value that the bin may hold; null for infinity")
    high: float | None = Field(description="greatest value that the bin may hold")
    count: int


class DisplayBinModel(_Model):
    """How many values about lie from one edge to the next."""

    low: float
    high: float
    count: float


class SpreadModel(_Model):
    """Exact counts in bins that are the same for every store."""

    total: int = Field(description="values, NaN excluded")
    nan: int
    minimum: float | None
    maximum: float | None
    bins: list[BinModel] = Field(description="those that hold values")
    quantiles: dict[str, BracketModel] = Field(description="by share, such as 0.99")


class HistogramModel(SpreadModel):
    """How the values of one unit are spread over ordinary rows."""

    scalar: str
    unit: list[int]
    rebinned: list[DisplayBinModel] = Field(description="bins of equal width, to look at")
    estimated: bool = Field(description="whether the counts of `rebinned` are estimates")


class SummaryModel(_Model):
    """Statistics of one unit over ordinary rows; null where undefined or not known."""

    count: int
    nan: int
    positive_share: float | None
    mean: float | None
    variance: float | None
    std: float | None
    skewness: float | None
    kurtosis: float | None
    min: float | None
    max: float | None
    special_min: float | None
    special_max: float | None
    quantiles: dict[str, BracketModel]


class StatisticsModel(_Model):
    """Statistics of a scalar's units, a row each."""

    scalar: str
    source: str = Field(description="what they were read from")
    quantiles: list[float] = Field(description="shares of which the rows have columns")
    total: int = Field(description="units in all; the next rows are after `offset`")
    rows: list[dict[str, Any]]


class LogitTokenModel(_Model):
    """A vocabulary token, and what a neuron adds to its logit per unit of activation."""

    token_id: int
    text: str
    logit: float | None


class SimilarNeuronModel(_Model):
    """A neuron that writes in nearly the same direction."""

    layer: int
    neuron: int
    cosine: float


class SequenceModel(_Model):
    """A sequence and its tokens."""

    sequence: int
    document: int
    segment: int
    first_token: int
    length: int
    text: str
    rows: list[dict[str, Any]]


class ScalarModel(_Model):
    """A derived scalar's declaration."""

    name: str
    family: str
    axes: list[str]
    node: str
    dependence: str
    definition: str
    meaning: str
    needs_gradient: bool
    rankable: bool
    backward: bool = Field(description="has a value in the backward pass")
    own: bool = Field(description="declared by the user, not built in")


class ScalarsModel(_Model):
    """The derived scalars that can be asked for."""

    scalars: list[ScalarModel]


class TensorModel(_Model):
    """A tensor with what stands along its axes."""

    name: str
    dims: list[str]
    shape: list[int]
    dtype: str
    layers: list[int] | None
    source: str
    token: list[int]
    sequence: list[int]
    position: list[int]
    attended: list[int] | None = None
    values: Numbers


class TopKModel(_Model):
    """The best values of a scalar, in order."""

    rows: list[dict[str, Any]]
    certificate: Certificate


class ComparisonModel(_Model):
    """The best places of several scalars, with the values of all."""

    rows: list[dict[str, Any]]
    certificates: dict[str, Certificate]


class ExplanationModel(_Model):
    """How a ranking would be answered."""

    scalar: str
    plan: str
    fallback: str | None
    bounded_by: str
    source: str
    groups: int
    segments: int
    pages: int
    pages_expected: int | None
    values: int


class ExampleModel(_Model):
    """A row, the tokens around it, and the unit's value at each."""

    token: int
    sequence: int
    position: int
    value: float | None
    quantile: float | None
    focus: int = Field(description="index of the row itself among the texts")
    first_token: int
    texts: list[str]
    values: list[float | None]


class ExamplesModel(_Model):
    """Contexts of one unit."""

    unit: list[int]
    kind: str
    rows: list[ExampleModel]
    certificate: Certificate


class NeuronExampleModel(_Model):
    """A row, the tokens around it, and the neuron's value at each."""

    token: int
    sequence: int
    position: int
    value: float | None
    quantile: float | None
    focus: int = Field(description="index of the row itself among the texts")
    texts: list[str]
    values: list[float | None]


class NeuronExamplesModel(_Model):
    """Contexts of a neuron."""

    unit: list[int]
    kind: str
    rows: list[NeuronExampleModel]
    certificate: Certificate


class NeuronModel(UnitModel):
    """A neuron: its row, and all that is known of it; null where the store lacks it."""

    layer: int
    neuron: int
    neurons: int = Field(description="of the layer")
    write_norm: float | None
    read_norm: float | None
    bias: float | None
    write_rank: int | None
    firing_rate: float | None
    dead: bool | None
    statistics: SummaryModel | None
    histogram: SpreadModel | None
    promoted: list[LogitTokenModel]
    suppressed: list[LogitTokenModel]
    similar: list[SimilarNeuronModel]
    similar_in_layer: list[SimilarNeuronModel]
    top: NeuronExamplesModel | None
    bottom: NeuronExamplesModel | None


class SqlRequest(_Model):
    """A query that is too long for an address."""

    q: Annotated[str, Field(min_length=1, description="one SELECT")]
    parameters: dict[str, Any] | list[Any] | None = Field(
        None, description="values of $name or of ?"
    )
    max_rows: Annotated[int, Field(ge=1)] | None = None


class SqlModel(_Model):
    """The rows of a query."""

    columns: list[ColumnModel]
    rows: list[list[Any]]
    truncated: bool = Field(description="whether there are more rows than the limit")
    seconds: float


class NodeModel(_Model):
    """A node of the text: a neuron, a head at a pair of tokens, a latent, a channel."""

    type: str = Field(description="mlp_neuron, attention_head, residual_stream_channel …")
    layer: SmallIndex | None = None
    indices: list[SmallIndex] = Field(
        min_length=1,
        max_length=3,
        description="(token, neuron), or (token, attended, head) for a head",
    )


class PromptRequest(_Model):
    """A text to run through the model, and what to say of it."""

    text: Annotated[str, Field(min_length=1)]
    scalars: list[str] | None = Field(
        None,
        max_length=16,
        description="derived scalars whose strongest nodes are listed; by default what neurons "
        "and heads write, and with an objective their attributions",
    )
    layers: list[SmallIndex] | None = Field(None, max_length=1024)
    top: Annotated[int, Field(ge=1, le=1000)] = 20
    values: bool = Field(False, description="whole tensors of the scalars too")
    target: str | int | None = Field(
        None, description="a token whose logit is attributed to the model's components"
    )
    against: str | int | None = Field(None, description="a token whose logit is subtracted")
    nodes: list[NodeModel] = Field(
        default_factory=list, max_length=16, description="whose token writes and reads are wanted"
    )
    tokens: Annotated[int, Field(ge=1, le=100)] = Field(
        10, description="tokens listed of each write and read"
    )


class TopNodesModel(_Model):
    """The nodes where a scalar is largest in magnitude."""

    scalar: str
    rows: list[dict[str, Any]]


class TokenScoreModel(_Model):
    """A vocabulary token with a node's number for it."""

    token_id: int
    text: str
    value: float | None


class NodeVectorsModel(_Model):
    """What a node writes to, or reads from, the vocabulary's space."""

    node: NodeModel
    kind: Literal["token_write", "token_read"]
    promoted: list[TokenScoreModel]
    suppressed: list[TokenScoreModel]


class PromptModel(_Model):
    """What the model did with a text."""

    token_ids: list[int]
    tokens: list[str]
    objective_value: float | None
    top: list[TopNodesModel]
    tensors: dict[str, TensorModel]
    attribution: list[dict[str, Any]] = Field(
        description="parts of the target's logit at the last token, by component, largest first"
    )
    vectors: list[NodeVectorsModel]
    notes: list[str] = Field(description="what could not be had, and why")
