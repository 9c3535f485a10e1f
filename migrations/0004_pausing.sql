-- 0004: pausing queues, and draining worker groups from outside.
--
-- Why tables, and not columns of what is there. A claim reads the paused queues under its own snapshot,
-- so a pause that committed holds for every claim that begins afterwards, in whatever group. And both
-- requests may be made inside somebody's long transaction: an update of a group's row would make its
-- beats wait for that transaction, until its lease is lost.

-- A row: nobody claims from this queue. Mostly empty.
CREATE TABLE triojobs.paused_queues (
    queue     text        PRIMARY KEY CHECK (octet_length(queue) BETWEEN 1 AND 255),
    reason    text        NOT NULL,
    paused_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- A row: this group shall stop claiming, finish what it runs, and close. Its next beat tells it.
CREATE TABLE triojobs.drains (
    group_id     uuid        PRIMARY KEY,
    reason       text        NOT NULL,
    requested_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
