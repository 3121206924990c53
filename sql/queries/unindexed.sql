-- The last of the next rows whose words are not indexed yet, and how many they are.
SELECT max(id), count(*)
FROM (SELECT id FROM history WHERE id > (SELECT up_to FROM indexed) ORDER BY id LIMIT ?1)
