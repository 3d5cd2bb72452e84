"""Names of methods, and the order in which reports have them. Knows nothing of models, nor of torch."""

FULL, ALONE = "full", "alone"
LOCAL_TOKENS = {
    f"beacons-local{number}": number for number in (0, 64, 128, 256)
}  # beacons with at least so many raw tokens, whatever the model's number
ORDER = (FULL, "recent", ALONE, "shuffled", "int8", "int4")  # of methods without a ratio
RATIO_ORDER = (
    *("beacons", "beacons-int8", "beacons-int4", *LOCAL_TOKENS, "recent", "head-tail", "streaming-llm"),
    *("snapkv", "expected-attention", "pyramidkv", "kvzip", "knorm", "streaming-llm-kvpress"),
)
