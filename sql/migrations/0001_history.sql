-- One row for each question with its answer.
CREATE TABLE history (
    id                INTEGER PRIMARY KEY AUTOINCREMENT, -- never used twice, also after deletions
    created_at        TEXT    NOT NULL, -- when the answer was complete: RFC 3339, UTC, milliseconds
    key_name          TEXT    NOT NULL, -- name of the client's key; 'anonymous' without keys
    question          TEXT    NOT NULL,
    answer            TEXT    NOT NULL, -- as far as it came
    model             TEXT    NOT NULL, -- the model that answered, in the upstream's words
    finish_reason     TEXT,             -- the upstream's word, 'client_gone' or 'upstream_error'
    prompt_tokens     INTEGER,          -- tokens; null where the model counted none
    completion_tokens INTEGER,          -- tokens
    total_tokens      INTEGER,          -- tokens
    latency_ms        INTEGER NOT NULL  -- milliseconds from the request to the complete answer
) STRICT;

-- A key's own pairs, newest first.
CREATE INDEX history_by_key ON history (key_name, id);

-- The words of questions and answers, under the id of their row. The texts themselves stay in history
-- alone. `key` holds the key's name in hex, which is one word, so that a search stays among a key's own.
CREATE VIRTUAL TABLE history_words USING fts5 (
    key, question, answer,
    content = '', contentless_delete = 1, tokenize = "unicode61 remove_diacritics 2"
);

-- Rows up to this id are in history_words; the rest is added when there is time, or before a search.
CREATE TABLE indexed (
    up_to INTEGER NOT NULL -- id of a row of history
) STRICT;
INSERT INTO indexed (up_to) VALUES (0);
