-- Requests that came with an Idempotency-Key, and the pair that answered them. Kept for a day.
CREATE TABLE idempotency (
    key_name        TEXT    NOT NULL, -- name of the client's key
    idempotency_key TEXT    NOT NULL, -- the client's word for this request
    path            TEXT    NOT NULL, -- of the endpoint
    request         BLOB    NOT NULL, -- the request's body, to tell a repetition from a mistake
    response        BLOB,             -- the answer's body; null where the row of history says it all
    history_id      INTEGER NOT NULL, -- id of the row in history
    created_at      INTEGER NOT NULL, -- Unix time, seconds
    PRIMARY KEY (key_name, idempotency_key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_by_age ON idempotency (created_at);
