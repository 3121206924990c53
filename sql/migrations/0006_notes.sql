-- In a table WITHOUT ROWID who looks for a note, or adds one, reads the bodies of those that it passes. The bodies stand last,
-- so that the other columns can be read without them.
CREATE TABLE notes (
    key_name        TEXT    NOT NULL, -- name of the client's key
    idempotency_key TEXT    NOT NULL, -- the client's word for this request
    path            TEXT    NOT NULL, -- of the endpoint
    history_id      INTEGER NOT NULL, -- id of the row in history
    created_at      INTEGER NOT NULL, -- Unix time, seconds
    request         BLOB    NOT NULL, -- the request's body, to tell a repetition from a mistake
    response        BLOB,             -- the answer's body; null where the row of history says it all
    PRIMARY KEY (key_name, idempotency_key)
) STRICT;
INSERT INTO notes SELECT key_name, idempotency_key, path, history_id, created_at, request, response FROM idempotency;
DROP TABLE idempotency;
PRAGMA legacy_alter_table = on;
ALTER TABLE notes RENAME TO idempotency;
PRAGMA legacy_alter_table = off;

CREATE INDEX idempotency_by_age ON idempotency (created_at);
