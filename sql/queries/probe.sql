-- Shows that the history can be written: a row where pairs go, which is taken back, and a value that changes, since what does
-- not is not written.
SAVEPOINT probe;
INSERT INTO history (id, created_at, key_name, question, answer, model, latency_ms)
VALUES ((SELECT coalesce(max(id), 0) FROM history) + 1, '', '', '', '', '', 0);
ROLLBACK TO probe;
RELEASE probe;
UPDATE indexed SET probes = probes + 1
