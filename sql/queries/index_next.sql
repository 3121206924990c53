-- The rows that follow the last indexed one, and how long their texts are, which costs no reading of them.
SELECT id, octet_length(question) + octet_length(answer)
FROM history
WHERE id > (SELECT up_to FROM indexed)
ORDER BY id
LIMIT ?1
