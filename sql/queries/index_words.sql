-- Adds the words of the rows that follow the last indexed one, up to an id.
INSERT INTO history_words (rowid, key, question, answer)
SELECT id, hex(key_name), plain(question), plain(answer)
FROM history
WHERE id > (SELECT up_to FROM indexed) AND id <= ?1
ORDER BY id
