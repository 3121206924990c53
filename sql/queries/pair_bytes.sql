-- Bytes of all pairs: of their texts, which costs no reading of them, and what else is in a row and in the index by key.
SELECT coalesce(sum(octet_length(question) + octet_length(answer) + 128), 0) FROM history
