-- Bytes of the texts of all pairs, which costs no reading of them.
SELECT coalesce(sum(octet_length(question) + octet_length(answer)), 0) FROM history
