import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]
    DATA_TYPE_INT64: _ClassVar[DataType]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_FLOAT32: _ClassVar[Encoding]
    ENCODING_FLOAT16: _ClassVar[Encoding]
    ENCODING_TOP_K: _ClassVar[Encoding]

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_COMPUTED: _ClassVar[Source]
    SOURCE_CACHED: _ClassVar[Source]
    SOURCE_COALESCED: _ClassVar[Source]

class CacheMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_MODE_UNSPECIFIED: _ClassVar[CacheMode]
    CACHE_MODE_USE: _ClassVar[CacheMode]
    CACHE_MODE_READ_ONLY: _ClassVar[CacheMode]
    CACHE_MODE_BYPASS: _ClassVar[CacheMode]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_INT32: DataType
DATA_TYPE_INT64: DataType
ENCODING_UNSPECIFIED: Encoding
ENCODING_FLOAT32: Encoding
ENCODING_FLOAT16: Encoding
ENCODING_TOP_K: Encoding
SOURCE_UNSPECIFIED: Source
SOURCE_COMPUTED: Source
SOURCE_CACHED: Source
SOURCE_COALESCED: Source
CACHE_MODE_UNSPECIFIED: CacheMode
CACHE_MODE_USE: CacheMode
CACHE_MODE_READ_ONLY: CacheMode
CACHE_MODE_BYPASS: CacheMode

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class OutputSpec(_message.Message):
    __slots__ = ("name", "encoding", "k", "temperature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    encoding: Encoding
    k: int
    temperature: float
    def __init__(self, name: _Optional[str] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., k: _Optional[int] = ..., temperature: _Optional[float] = ...) -> None: ...

class Answers(_message.Message):
    __slots__ = ("name", "encoding", "shape", "values", "indices", "tail_mass", "k", "temperature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    TAIL_MASS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    encoding: Encoding
    shape: _containers.RepeatedScalarFieldContainer[int]
    values: bytes
    indices: bytes
    tail_mass: bytes
    k: int
    temperature: float
    def __init__(self, name: _Optional[str] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., shape: _Optional[_Iterable[int]] = ..., values: _Optional[bytes] = ..., indices: _Optional[bytes] = ..., tail_mass: _Optional[bytes] = ..., k: _Optional[int] = ..., temperature: _Optional[float] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    def __init__(self, teacher: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("teachers", "server_version", "replicas", "address", "tenant")
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    teachers: _containers.RepeatedCompositeFieldContainer[TeacherDescription]
    server_version: str
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    address: str
    tenant: str
    def __init__(self, teachers: _Optional[_Iterable[_Union[TeacherDescription, _Mapping]]] = ..., server_version: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., address: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("address", "teacher", "fingerprint")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    address: str
    teacher: str
    fingerprint: str
    def __init__(self, address: _Optional[str] = ..., teacher: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class TeacherDescription(_message.Message):
    __slots__ = ("name", "fingerprint", "inputs", "outputs", "flops_per_sample", "price", "limits", "precision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    FLOPS_PER_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    inputs: _containers.RepeatedCompositeFieldContainer[InputDescription]
    outputs: _containers.RepeatedCompositeFieldContainer[OutputDescription]
    flops_per_sample: float
    price: Price
    limits: Limits
    precision: Precision
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[InputDescription, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[OutputDescription, _Mapping]]] = ..., flops_per_sample: _Optional[float] = ..., price: _Optional[_Union[Price, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., precision: _Optional[_Union[Precision, _Mapping]] = ...) -> None: ...

class InputDescription(_message.Message):
    __slots__ = ("name", "dtypes", "shape", "normalisation", "minimum", "maximum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtypes: _containers.RepeatedScalarFieldContainer[DataType]
    shape: _containers.RepeatedScalarFieldContainer[int]
    normalisation: Normalisation
    minimum: _containers.RepeatedScalarFieldContainer[float]
    maximum: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., dtypes: _Optional[_Iterable[_Union[DataType, str]]] = ..., shape: _Optional[_Iterable[int]] = ..., normalisation: _Optional[_Union[Normalisation, _Mapping]] = ..., minimum: _Optional[_Iterable[float]] = ..., maximum: _Optional[_Iterable[float]] = ...) -> None: ...

class Normalisation(_message.Message):
    __slots__ = ("mean", "std")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ...) -> None: ...

class OutputDescription(_message.Message):
    __slots__ = ("name", "shape", "class_names", "top1")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    TOP1_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    class_names: _containers.RepeatedScalarFieldContainer[str]
    top1: float
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., class_names: _Optional[_Iterable[str]] = ..., top1: _Optional[float] = ...) -> None: ...

class Price(_message.Message):
    __slots__ = ("nanos_per_sample", "currency")
    NANOS_PER_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    nanos_per_sample: int
    currency: str
    def __init__(self, nanos_per_sample: _Optional[int] = ..., currency: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_samples_per_query", "max_batch_size")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_PER_QUERY_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_samples_per_query: int
    max_batch_size: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_samples_per_query: _Optional[int] = ..., max_batch_size: _Optional[int] = ...) -> None: ...

class Precision(_message.Message):
    __slots__ = ("policy", "absolute_tolerance", "relative_tolerance")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    policy: str
    absolute_tolerance: float
    relative_tolerance: float
    def __init__(self, policy: _Optional[str] = ..., absolute_tolerance: _Optional[float] = ..., relative_tolerance: _Optional[float] = ...) -> None: ...

class LabelRequest(_message.Message):
    __slots__ = ("teacher", "inputs", "outputs", "request_id", "expected_fingerprint", "cache_mode", "cache_namespace", "candidates")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CACHE_MODE_FIELD_NUMBER: _ClassVar[int]
    CACHE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    inputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    outputs: _containers.RepeatedCompositeFieldContainer[OutputSpec]
    request_id: str
    expected_fingerprint: str
    cache_mode: CacheMode
    cache_namespace: str
    candidates: int
    def __init__(self, teacher: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[OutputSpec, _Mapping]]] = ..., request_id: _Optional[str] = ..., expected_fingerprint: _Optional[str] = ..., cache_mode: _Optional[_Union[CacheMode, str]] = ..., cache_namespace: _Optional[str] = ..., candidates: _Optional[int] = ...) -> None: ...

class LabelResponse(_message.Message):
    __slots__ = ("fingerprint", "answers", "sources", "cost", "budgets")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    answers: _containers.RepeatedCompositeFieldContainer[Answers]
    sources: _containers.RepeatedScalarFieldContainer[Source]
    cost: Cost
    budgets: _containers.RepeatedCompositeFieldContainer[Budget]
    def __init__(self, fingerprint: _Optional[str] = ..., answers: _Optional[_Iterable[_Union[Answers, _Mapping]]] = ..., sources: _Optional[_Iterable[_Union[Source, str]]] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., budgets: _Optional[_Iterable[_Union[Budget, _Mapping]]] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("samples", "money_nanos", "currency", "flops", "device_nanoseconds")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MONEY_NANOS_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NANOSECONDS_FIELD_NUMBER: _ClassVar[int]
    samples: int
    money_nanos: int
    currency: str
    flops: float
    device_nanoseconds: int
    def __init__(self, samples: _Optional[int] = ..., money_nanos: _Optional[int] = ..., currency: _Optional[str] = ..., flops: _Optional[float] = ..., device_nanoseconds: _Optional[int] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("owner", "name", "unit", "limit", "left", "until", "period")
    class Owner(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OWNER_UNSPECIFIED: _ClassVar[Budget.Owner]
        OWNER_TENANT: _ClassVar[Budget.Owner]
        OWNER_JOB: _ClassVar[Budget.Owner]
    OWNER_UNSPECIFIED: Budget.Owner
    OWNER_TENANT: Budget.Owner
    OWNER_JOB: Budget.Owner
    class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNIT_UNSPECIFIED: _ClassVar[Budget.Unit]
        UNIT_SAMPLES: _ClassVar[Budget.Unit]
        UNIT_MONEY_NANOS: _ClassVar[Budget.Unit]
    UNIT_UNSPECIFIED: Budget.Unit
    UNIT_SAMPLES: Budget.Unit
    UNIT_MONEY_NANOS: Budget.Unit
    class Period(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PERIOD_UNSPECIFIED: _ClassVar[Budget.Period]
        PERIOD_TOTAL: _ClassVar[Budget.Period]
        PERIOD_DAY: _ClassVar[Budget.Period]
        PERIOD_MONTH: _ClassVar[Budget.Period]
    PERIOD_UNSPECIFIED: Budget.Period
    PERIOD_TOTAL: Budget.Period
    PERIOD_DAY: Budget.Period
    PERIOD_MONTH: Budget.Period
    OWNER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    owner: Budget.Owner
    name: str
    unit: Budget.Unit
    limit: int
    left: int
    until: _timestamp_pb2.Timestamp
    period: Budget.Period
    def __init__(self, owner: _Optional[_Union[Budget.Owner, str]] = ..., name: _Optional[str] = ..., unit: _Optional[_Union[Budget.Unit, str]] = ..., limit: _Optional[int] = ..., left: _Optional[int] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., period: _Optional[_Union[Budget.Period, str]] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("teacher", "keys", "outputs", "expected_fingerprint", "cache_namespace", "candidates")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CACHE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    outputs: _containers.RepeatedCompositeFieldContainer[OutputSpec]
    expected_fingerprint: str
    cache_namespace: str
    candidates: int
    def __init__(self, teacher: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ..., outputs: _Optional[_Iterable[_Union[OutputSpec, _Mapping]]] = ..., expected_fingerprint: _Optional[str] = ..., cache_namespace: _Optional[str] = ..., candidates: _Optional[int] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("fingerprint", "found", "answers")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    found: _containers.RepeatedScalarFieldContainer[bool]
    answers: _containers.RepeatedCompositeFieldContainer[Answers]
    def __init__(self, fingerprint: _Optional[str] = ..., found: _Optional[_Iterable[bool]] = ..., answers: _Optional[_Iterable[_Union[Answers, _Mapping]]] = ...) -> None: ...

class SpendRequest(_message.Message):
    __slots__ = ("job", "since", "until")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    job: str
    since: _timestamp_pb2.Timestamp
    until: _timestamp_pb2.Timestamp
    def __init__(self, job: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class SpendResponse(_message.Message):
    __slots__ = ("lines", "budgets")
    LINES_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    lines: _containers.RepeatedCompositeFieldContainer[SpendLine]
    budgets: _containers.RepeatedCompositeFieldContainer[Budget]
    def __init__(self, lines: _Optional[_Iterable[_Union[SpendLine, _Mapping]]] = ..., budgets: _Optional[_Iterable[_Union[Budget, _Mapping]]] = ...) -> None: ...

class SpendLine(_message.Message):
    __slots__ = ("tenant", "job", "day", "fingerprint", "asked", "computed", "cached", "coalesced", "flops", "device_nanoseconds", "money_nanos", "currency", "nanos_per_sample", "candidates")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    DAY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    COALESCED_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NANOSECONDS_FIELD_NUMBER: _ClassVar[int]
    MONEY_NANOS_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    NANOS_PER_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    job: str
    day: str
    fingerprint: str
    asked: int
    computed: int
    cached: int
    coalesced: int
    flops: float
    device_nanoseconds: int
    money_nanos: int
    currency: str
    nanos_per_sample: int
    candidates: int
    def __init__(self, tenant: _Optional[str] = ..., job: _Optional[str] = ..., day: _Optional[str] = ..., fingerprint: _Optional[str] = ..., asked: _Optional[int] = ..., computed: _Optional[int] = ..., cached: _Optional[int] = ..., coalesced: _Optional[int] = ..., flops: _Optional[float] = ..., device_nanoseconds: _Optional[int] = ..., money_nanos: _Optional[int] = ..., currency: _Optional[str] = ..., nanos_per_sample: _Optional[int] = ..., candidates: _Optional[int] = ...) -> None: ...
