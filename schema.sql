-- The only table. This file can be applied again and again: psql -f schema.sql

CREATE TABLE IF NOT EXISTS messages (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY CHECK (id > 0),
    text       text NOT NULL CHECK (text ~ '[^[:space:]]' AND octet_length(text) <= 65536),
    created_at timestamptz NOT NULL DEFAULT now()
);
