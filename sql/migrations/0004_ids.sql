-- Ids without AUTOINCREMENT, whose bookkeeping costs a page more in each commit and a lone commit half of its
-- time. That no id is used twice is the writer's business; see append.sql.
ALTER TABLE indexed ADD COLUMN last_id INTEGER NOT NULL DEFAULT 0; -- an id that was given; later ones may have been
ALTER TABLE indexed ADD COLUMN probes INTEGER NOT NULL DEFAULT 0; -- trial writes so far
UPDATE indexed SET last_id = (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'history');

-- One row for each question with its answer.
CREATE TABLE history_with_ids (
    id                INTEGER PRIMARY KEY, -- never used twice
    created_at        TEXT    NOT NULL, -- when the answer was complete: RFC 3339, UTC, milliseconds
    key_name          TEXT    NOT NULL, -- name of the client's key; 'anonymous' without keys
    question          TEXT    NOT NULL,
    answer            TEXT    NOT NULL, -- as far as it came
    model             TEXT    NOT NULL, -- the model that answered, in the upstream's words
    finish_reason     TEXT,             -- the upstream's word; where cut short why: 'client_gone', 'upstream_error', 'shutting_down'
    prompt_tokens     INTEGER,          -- tokens; null where the model counted none
    completion_tokens INTEGER,          -- tokens
    total_tokens      INTEGER,          -- tokens
    latency_ms        INTEGER NOT NULL  -- milliseconds from the request to the complete answer
) STRICT;
INSERT INTO history_with_ids SELECT * FROM history;
DROP TABLE history;
-- Views of the user's own would be in the way, since what they look at is not there at this moment.
PRAGMA legacy_alter_table = on;
ALTER TABLE history_with_ids RENAME TO history;
PRAGMA legacy_alter_table = off;

-- A key's own pairs, newest first.
CREATE INDEX history_by_key ON history (key_name, id);
