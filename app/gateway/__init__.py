"""The HTTP side of the broker: requests in over HTTP, through Kafka to the workers, their replies out.

The gateway decides nothing. What it can carry it carries to Kafka, where every request gets its decision and its
record; what it refuses by itself (no JSON object, too large, too many waiting) never got there, and says so.
"""
