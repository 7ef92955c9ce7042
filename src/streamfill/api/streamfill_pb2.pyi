from google.protobuf import any_pb2 as _any_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STREAM_MODE_UNSPECIFIED: _ClassVar[StreamMode]
    STREAM_MODE_APPEND: _ClassVar[StreamMode]
    STREAM_MODE_UPDATE: _ClassVar[StreamMode]

class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODE_OK: _ClassVar[Code]
    CODE_CANCELLED: _ClassVar[Code]
    CODE_UNKNOWN: _ClassVar[Code]
    CODE_INVALID_ARGUMENT: _ClassVar[Code]
    CODE_DEADLINE_EXCEEDED: _ClassVar[Code]
    CODE_NOT_FOUND: _ClassVar[Code]
    CODE_ALREADY_EXISTS: _ClassVar[Code]
    CODE_PERMISSION_DENIED: _ClassVar[Code]
    CODE_RESOURCE_EXHAUSTED: _ClassVar[Code]
    CODE_FAILED_PRECONDITION: _ClassVar[Code]
    CODE_ABORTED: _ClassVar[Code]
    CODE_OUT_OF_RANGE: _ClassVar[Code]
    CODE_UNIMPLEMENTED: _ClassVar[Code]
    CODE_INTERNAL: _ClassVar[Code]
    CODE_UNAVAILABLE: _ClassVar[Code]
    CODE_DATA_LOSS: _ClassVar[Code]
    CODE_UNAUTHENTICATED: _ClassVar[Code]
STREAM_MODE_UNSPECIFIED: StreamMode
STREAM_MODE_APPEND: StreamMode
STREAM_MODE_UPDATE: StreamMode
CODE_OK: Code
CODE_CANCELLED: Code
CODE_UNKNOWN: Code
CODE_INVALID_ARGUMENT: Code
CODE_DEADLINE_EXCEEDED: Code
CODE_NOT_FOUND: Code
CODE_ALREADY_EXISTS: Code
CODE_PERMISSION_DENIED: Code
CODE_RESOURCE_EXHAUSTED: Code
CODE_FAILED_PRECONDITION: Code
CODE_ABORTED: Code
CODE_OUT_OF_RANGE: Code
CODE_UNIMPLEMENTED: Code
CODE_INTERNAL: Code
CODE_UNAVAILABLE: Code
CODE_DATA_LOSS: Code
CODE_UNAUTHENTICATED: Code

class StreamRequest(_message.Message):
    __slots__ = ("seq", "open", "append", "update", "commit", "cancel", "resume")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    seq: int
    open: Open
    append: Append
    update: Update
    commit: Commit
    cancel: Cancel
    resume: Resume
    def __init__(self, seq: _Optional[int] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., append: _Optional[_Union[Append, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ...) -> None: ...

class StreamsRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[LaneRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[LaneRequest, _Mapping]]] = ...) -> None: ...

class LaneRequest(_message.Message):
    __slots__ = ("lane", "request", "hang_up", "traceparent")
    LANE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    HANG_UP_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    lane: int
    request: StreamRequest
    hang_up: HangUp
    traceparent: str
    def __init__(self, lane: _Optional[int] = ..., request: _Optional[_Union[StreamRequest, _Mapping]] = ..., hang_up: _Optional[_Union[HangUp, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class HangUp(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Resume(_message.Message):
    __slots__ = ("stream_id", "next_token_index", "next_seq", "refused_seqs")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    REFUSED_SEQS_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    next_token_index: int
    next_seq: int
    refused_seqs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stream_id: _Optional[int] = ..., next_token_index: _Optional[int] = ..., next_seq: _Optional[int] = ..., refused_seqs: _Optional[_Iterable[int]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("mode", "priority", "request_id", "deadline_s", "messages", "ttft_slo_ms")
    MODE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    mode: StreamMode
    priority: int
    request_id: str
    deadline_s: float
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    ttft_slo_ms: float
    def __init__(self, mode: _Optional[_Union[StreamMode, str]] = ..., priority: _Optional[int] = ..., request_id: _Optional[str] = ..., deadline_s: _Optional[float] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., ttft_slo_ms: _Optional[float] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("text", "text_utf8", "token_ids", "messages", "next_in_s")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TEXT_UTF8_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_IN_S_FIELD_NUMBER: _ClassVar[int]
    text: str
    text_utf8: bytes
    token_ids: TokenIds
    messages: ChatMessages
    next_in_s: float
    def __init__(self, text: _Optional[str] = ..., text_utf8: _Optional[bytes] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., messages: _Optional[_Union[ChatMessages, _Mapping]] = ..., next_in_s: _Optional[float] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Append(_message.Message):
    __slots__ = ("segment",)
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    segment: Segment
    def __init__(self, segment: _Optional[_Union[Segment, _Mapping]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("segment",)
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    segment: Segment
    def __init__(self, segment: _Optional[_Union[Segment, _Mapping]] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("sampling", "final_segment", "keep_s")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    FINAL_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    KEEP_S_FIELD_NUMBER: _ClassVar[int]
    sampling: Sampling
    final_segment: Segment
    keep_s: float
    def __init__(self, sampling: _Optional[_Union[Sampling, _Mapping]] = ..., final_segment: _Optional[_Union[Segment, _Mapping]] = ..., keep_s: _Optional[float] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "logprobs", "skip_special_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    max_tokens: int
    min_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    seed: int
    logprobs: int
    skip_special_tokens: bool
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., skip_special_tokens: _Optional[bool] = ...) -> None: ...

class StreamEvent(_message.Message):
    __slots__ = ("opened", "acknowledged", "token", "done", "error", "failed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    acknowledged: Acknowledged
    token: Token
    done: Done
    error: Error
    failed: Error
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., acknowledged: _Optional[_Union[Acknowledged, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., failed: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class StreamsReply(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[LaneReply]
    def __init__(self, replies: _Optional[_Iterable[_Union[LaneReply, _Mapping]]] = ...) -> None: ...

class LaneReply(_message.Message):
    __slots__ = ("lane", "event")
    LANE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    lane: int
    event: StreamEvent
    def __init__(self, lane: _Optional[int] = ..., event: _Optional[_Union[StreamEvent, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("stream_id", "is_resumable", "acknowledged", "is_committed", "refused")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    IS_RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    IS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    is_resumable: bool
    acknowledged: Acknowledged
    is_committed: bool
    refused: _containers.RepeatedCompositeFieldContainer[Error]
    def __init__(self, stream_id: _Optional[int] = ..., is_resumable: _Optional[bool] = ..., acknowledged: _Optional[_Union[Acknowledged, _Mapping]] = ..., is_committed: _Optional[bool] = ..., refused: _Optional[_Iterable[_Union[Error, _Mapping]]] = ...) -> None: ...

class Acknowledged(_message.Message):
    __slots__ = ("seq", "num_received_tokens", "num_computed_tokens", "num_invalidated_tokens")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    NUM_RECEIVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_INVALIDATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    num_received_tokens: int
    num_computed_tokens: int
    num_invalidated_tokens: int
    def __init__(self, seq: _Optional[int] = ..., num_received_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., num_invalidated_tokens: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("index", "token_id", "text", "logprob")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_id: int
    text: str
    logprob: TokenLogprob
    def __init__(self, index: _Optional[int] = ..., token_id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[_Union[TokenLogprob, _Mapping]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("logprob", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("finish_reason", "matched_stop_string", "matched_stop_token_id", "text_tail", "usage", "metadata")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_TAIL_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    finish_reason: str
    matched_stop_string: str
    matched_stop_token_id: int
    text_tail: str
    usage: Usage
    metadata: AnswerMetadata
    def __init__(self, finish_reason: _Optional[str] = ..., matched_stop_string: _Optional[str] = ..., matched_stop_token_id: _Optional[int] = ..., text_tail: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., metadata: _Optional[_Union[AnswerMetadata, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_output_tokens", "num_cached_tokens", "num_invalidated_tokens", "num_computed_tokens", "num_recomputed_tokens", "num_reused_tokens")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_INVALIDATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_invalidated_tokens: int
    num_computed_tokens: int
    num_recomputed_tokens: int
    num_reused_tokens: int
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_invalidated_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., num_recomputed_tokens: _Optional[int] = ..., num_reused_tokens: _Optional[int] = ...) -> None: ...

class AnswerMetadata(_message.Message):
    __slots__ = ("stream_id", "prefill_server", "decode_server", "decoded_by_prefill", "handoff", "num_attempts", "lifetime", "handoff_bytes", "handoff_s", "kv_codec")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SERVER_FIELD_NUMBER: _ClassVar[int]
    DECODE_SERVER_FIELD_NUMBER: _ClassVar[int]
    DECODED_BY_PREFILL_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    KV_CODEC_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    prefill_server: str
    decode_server: str
    decoded_by_prefill: bool
    handoff: str
    num_attempts: int
    lifetime: _containers.RepeatedCompositeFieldContainer[LifetimeEvent]
    handoff_bytes: int
    handoff_s: float
    kv_codec: str
    def __init__(self, stream_id: _Optional[int] = ..., prefill_server: _Optional[str] = ..., decode_server: _Optional[str] = ..., decoded_by_prefill: _Optional[bool] = ..., handoff: _Optional[str] = ..., num_attempts: _Optional[int] = ..., lifetime: _Optional[_Iterable[_Union[LifetimeEvent, _Mapping]]] = ..., handoff_bytes: _Optional[int] = ..., handoff_s: _Optional[float] = ..., kv_codec: _Optional[str] = ...) -> None: ...

class LifetimeEvent(_message.Message):
    __slots__ = ("name", "time_s", "segment", "num_tokens", "reason", "predicted_s", "actual_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    time_s: float
    segment: int
    num_tokens: int
    reason: str
    predicted_s: float
    actual_s: float
    def __init__(self, name: _Optional[str] = ..., time_s: _Optional[float] = ..., segment: _Optional[int] = ..., num_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., predicted_s: _Optional[float] = ..., actual_s: _Optional[float] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("seq", "code", "message", "details")
    class DetailsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    code: Code
    message: str
    details: _containers.ScalarMap[str, str]
    def __init__(self, seq: _Optional[int] = ..., code: _Optional[_Union[Code, str]] = ..., message: _Optional[str] = ..., details: _Optional[_Mapping[str, str]] = ...) -> None: ...

class OpenStreamRequest(_message.Message):
    __slots__ = ("open",)
    OPEN_FIELD_NUMBER: _ClassVar[int]
    open: Open
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ...) -> None: ...

class OpenStreamResponse(_message.Message):
    __slots__ = ("stream_id", "is_resumable")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    IS_RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    is_resumable: bool
    def __init__(self, stream_id: _Optional[int] = ..., is_resumable: _Optional[bool] = ...) -> None: ...

class AppendSegmentRequest(_message.Message):
    __slots__ = ("stream_id", "seq", "segment")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    seq: int
    segment: Segment
    def __init__(self, stream_id: _Optional[int] = ..., seq: _Optional[int] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ...) -> None: ...

class UpdateContextRequest(_message.Message):
    __slots__ = ("stream_id", "seq", "segment")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    seq: int
    segment: Segment
    def __init__(self, stream_id: _Optional[int] = ..., seq: _Optional[int] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ...) -> None: ...

class CommitStreamRequest(_message.Message):
    __slots__ = ("stream_id", "seq", "commit", "next_token_index")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    seq: int
    commit: Commit
    next_token_index: int
    def __init__(self, stream_id: _Optional[int] = ..., seq: _Optional[int] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., next_token_index: _Optional[int] = ...) -> None: ...

class CancelStreamRequest(_message.Message):
    __slots__ = ("stream_id", "reason")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    reason: str
    def __init__(self, stream_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class CancelStreamResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStreamRequest(_message.Message):
    __slots__ = ("stream_id",)
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    def __init__(self, stream_id: _Optional[int] = ...) -> None: ...

class GetStreamResponse(_message.Message):
    __slots__ = ("stream_id", "request_id", "mode", "priority", "state", "acknowledged", "num_output_tokens")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    request_id: str
    mode: StreamMode
    priority: int
    state: str
    acknowledged: Acknowledged
    num_output_tokens: int
    def __init__(self, stream_id: _Optional[int] = ..., request_id: _Optional[str] = ..., mode: _Optional[_Union[StreamMode, str]] = ..., priority: _Optional[int] = ..., state: _Optional[str] = ..., acknowledged: _Optional[_Union[Acknowledged, _Mapping]] = ..., num_output_tokens: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "sampling", "priority", "request_id", "deadline_s", "ttft_slo_ms")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    prompt: Segment
    sampling: Sampling
    priority: int
    request_id: str
    deadline_s: float
    ttft_slo_ms: float
    def __init__(self, prompt: _Optional[_Union[Segment, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., priority: _Optional[int] = ..., request_id: _Optional[str] = ..., deadline_s: _Optional[float] = ..., ttft_slo_ms: _Optional[float] = ...) -> None: ...

class ServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerInfoResponse(_message.Message):
    __slots__ = ("model", "vocab_size", "context_tokens", "pool_tokens", "ready", "decode_available", "num_open_streams", "num_streams_by_outcome", "num_malformed_frames", "servers", "ready_reason", "num_moves", "placement")
    class NumStreamsByOutcomeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class NumMovesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POOL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DECODE_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_STREAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_BY_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    NUM_MALFORMED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    READY_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVES_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    model: str
    vocab_size: int
    context_tokens: int
    pool_tokens: int
    ready: bool
    decode_available: bool
    num_open_streams: int
    num_streams_by_outcome: _containers.ScalarMap[str, int]
    num_malformed_frames: int
    servers: _containers.RepeatedCompositeFieldContainer[Server]
    ready_reason: str
    num_moves: _containers.ScalarMap[str, int]
    placement: str
    def __init__(self, model: _Optional[str] = ..., vocab_size: _Optional[int] = ..., context_tokens: _Optional[int] = ..., pool_tokens: _Optional[int] = ..., ready: _Optional[bool] = ..., decode_available: _Optional[bool] = ..., num_open_streams: _Optional[int] = ..., num_streams_by_outcome: _Optional[_Mapping[str, int]] = ..., num_malformed_frames: _Optional[int] = ..., servers: _Optional[_Iterable[_Union[Server, _Mapping]]] = ..., ready_reason: _Optional[str] = ..., num_moves: _Optional[_Mapping[str, int]] = ..., placement: _Optional[str] = ...) -> None: ...

class Server(_message.Message):
    __slots__ = ("server_id", "role", "state", "pid", "num_assigned_streams", "heartbeat_age_s", "loop_age_s", "controller_alive", "counters", "policy", "state_reason", "address", "version", "pool_tokens", "num_held_tokens")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NUM_ASSIGNED_STREAMS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LOOP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_ALIVE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    POOL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    role: str
    state: str
    pid: int
    num_assigned_streams: int
    heartbeat_age_s: float
    loop_age_s: float
    controller_alive: bool
    counters: _containers.ScalarMap[str, int]
    policy: str
    state_reason: str
    address: str
    version: str
    pool_tokens: int
    num_held_tokens: int
    def __init__(self, server_id: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., pid: _Optional[int] = ..., num_assigned_streams: _Optional[int] = ..., heartbeat_age_s: _Optional[float] = ..., loop_age_s: _Optional[float] = ..., controller_alive: _Optional[bool] = ..., counters: _Optional[_Mapping[str, int]] = ..., policy: _Optional[str] = ..., state_reason: _Optional[str] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., pool_tokens: _Optional[int] = ..., num_held_tokens: _Optional[int] = ...) -> None: ...

class DrainServerRequest(_message.Message):
    __slots__ = ("server_id", "move_answers_after_s", "force")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    MOVE_ANSWERS_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    move_answers_after_s: float
    force: bool
    def __init__(self, server_id: _Optional[str] = ..., move_answers_after_s: _Optional[float] = ..., force: _Optional[bool] = ...) -> None: ...

class ResumeServerRequest(_message.Message):
    __slots__ = ("server_id",)
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    def __init__(self, server_id: _Optional[str] = ...) -> None: ...

class FlushCachesRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class FlushCachesResponse(_message.Message):
    __slots__ = ("flushed",)
    class FlushedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bool
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bool] = ...) -> None: ...
    FLUSHED_FIELD_NUMBER: _ClassVar[int]
    flushed: _containers.ScalarMap[str, bool]
    def __init__(self, flushed: _Optional[_Mapping[str, bool]] = ...) -> None: ...

class SetPolicyRequest(_message.Message):
    __slots__ = ("policy", "options", "server_id", "timeout_s")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    POLICY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    policy: str
    options: _containers.ScalarMap[str, str]
    server_id: str
    timeout_s: float
    def __init__(self, policy: _Optional[str] = ..., options: _Optional[_Mapping[str, str]] = ..., server_id: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class SetPolicyResponse(_message.Message):
    __slots__ = ("results",)
    class ResultsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: PolicyResult
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[PolicyResult, _Mapping]] = ...) -> None: ...
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.MessageMap[str, PolicyResult]
    def __init__(self, results: _Optional[_Mapping[str, PolicyResult]] = ...) -> None: ...

class PolicyResult(_message.Message):
    __slots__ = ("ok", "policy", "reason")
    OK_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    policy: str
    reason: str
    def __init__(self, ok: _Optional[bool] = ..., policy: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DescribeStreamsRequest(_message.Message):
    __slots__ = ("stream_id", "timeout_s")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    timeout_s: float
    def __init__(self, stream_id: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DescribeStreamsResponse(_message.Message):
    __slots__ = ("servers",)
    class ServersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ServerStreams
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ServerStreams, _Mapping]] = ...) -> None: ...
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    servers: _containers.MessageMap[str, ServerStreams]
    def __init__(self, servers: _Optional[_Mapping[str, ServerStreams]] = ...) -> None: ...

class ServerStreams(_message.Message):
    __slots__ = ("answered", "role", "policy", "streams")
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    answered: bool
    role: str
    policy: str
    streams: _containers.RepeatedCompositeFieldContainer[StreamDecision]
    def __init__(self, answered: _Optional[bool] = ..., role: _Optional[str] = ..., policy: _Optional[str] = ..., streams: _Optional[_Iterable[_Union[StreamDecision, _Mapping]]] = ...) -> None: ...

class StreamDecision(_message.Message):
    __slots__ = ("stream_id", "state", "num_known_tokens", "num_computed_tokens", "num_shared_tokens", "priority", "idle_s", "expected_next_s", "decision", "reason", "victim_rank")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_KNOWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_NEXT_S_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VICTIM_RANK_FIELD_NUMBER: _ClassVar[int]
    stream_id: int
    state: str
    num_known_tokens: int
    num_computed_tokens: int
    num_shared_tokens: int
    priority: int
    idle_s: float
    expected_next_s: float
    decision: str
    reason: str
    victim_rank: int
    def __init__(self, stream_id: _Optional[int] = ..., state: _Optional[str] = ..., num_known_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., num_shared_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., idle_s: _Optional[float] = ..., expected_next_s: _Optional[float] = ..., decision: _Optional[str] = ..., reason: _Optional[str] = ..., victim_rank: _Optional[int] = ...) -> None: ...

class RpcStatus(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class RpcErrorInfo(_message.Message):
    __slots__ = ("reason", "domain", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    reason: str
    domain: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, reason: _Optional[str] = ..., domain: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...
