-- 0001: the core tables.
--
-- Why this shape. Nothing on a job's way is updated in place: each transition deletes from one
-- narrow table and inserts into the next, so that the cost of claiming and settling does not
-- depend on the payload, and "exactly one place" is what the primary keys say. The body (`jobs`)
-- is written once. See STORAGE rules beside each statement in triojobs/_sql.
--
-- No foreign keys to `jobs`: they forbid dropping old partitions and cost a lock per row.

-- One sequence for job ids: `new_job_id` hands them out ahead of an enqueue, and partitions
-- follow it. Cache 1 keeps ids close to the order of enqueues.
CREATE SEQUENCE triojobs.job_ids AS bigint;
-- The order of outcomes; the last outcome of a job is the one with the greatest number.
CREATE SEQUENCE triojobs.outcome_nos AS bigint;

-- The bodies, in ranges of a million ids, so that old ones are dropped and not deleted. The
-- default partition takes ids that are ahead of the ranges, and the few survivors of a drop.
CREATE TABLE triojobs.jobs (
    id           bigint      NOT NULL DEFAULT nextval('triojobs.job_ids'),
    queue        text        NOT NULL CHECK (octet_length(queue) BETWEEN 1 AND 255),
    payload      bytea       NOT NULL,
    encoding     text        NOT NULL DEFAULT 'cbor',
    key          text        CHECK (octet_length(key) <= 1024),
    metadata     jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    priority     int         NOT NULL DEFAULT 0 CHECK (priority >= 0),
    max_attempts int         NOT NULL DEFAULT 5 CHECK (max_attempts >= 1),
    timeout      float8      CHECK (timeout > 0),
    deadline     timestamptz,
    run_at       timestamptz NOT NULL,
    enqueued_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (id)
) PARTITION BY RANGE (id);

-- One row per ended attempt, and one for a job cancelled while it waited (no group, no claim).
-- The unique constraint makes "two outcomes of one claim" impossible and serves reads by job.
CREATE TABLE triojobs.outcomes (
    job_id      bigint      NOT NULL,
    no          bigint      NOT NULL DEFAULT nextval('triojobs.outcome_nos'),
    group_id    uuid,
    claim_no    bigint,
    attempt     int         NOT NULL,
    status      text        NOT NULL CHECK (status IN ('done', 'failed', 'killed', 'cancelled')),
    error       text,
    result      bytea,
    encoding    text,
    claimed_at  timestamptz,
    finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (job_id, group_id, claim_no)
) PARTITION BY RANGE (job_id);

CREATE TABLE triojobs.jobs_default PARTITION OF triojobs.jobs DEFAULT;
CREATE TABLE triojobs.outcomes_default PARTITION OF triojobs.outcomes DEFAULT;

-- Creates the partitions that ids will need next (the current range and two ahead), and says how
-- many. Called by worker groups once in a while; costs one catalogue look-up when there is
-- nothing to do. A range that already has rows in the default partition is left there.
CREATE FUNCTION triojobs.add_partitions(ahead int DEFAULT 2) RETURNS int
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    width   CONSTANT bigint := 1000000;
    space   CONSTANT text := (SELECT relnamespace::regnamespace::text FROM pg_class
                              WHERE oid = 'triojobs.jobs'::regclass);
    current bigint := (SELECT last_value / width FROM triojobs.job_ids);
    made    int := 0;
    parent  text;
BEGIN
    FOR n IN current .. current + ahead LOOP
        FOREACH parent IN ARRAY ARRAY['jobs', 'outcomes'] LOOP
            CONTINUE WHEN to_regclass(format('%s.%I', space, parent || '_' || n)) IS NOT NULL;
            BEGIN
                EXECUTE format('CREATE TABLE %s.%I PARTITION OF %s.%I FOR VALUES FROM (%s) TO (%s)',
                    space, parent || '_' || n, space, parent, n * width, (n + 1) * width);
                made := made + 1;
            EXCEPTION WHEN check_violation OR duplicate_table OR invalid_object_definition THEN
                NULL;  -- rows of this range already live in the default partition, or a rival was first
            END;
        END LOOP;
    END LOOP;
    RETURN made;
END $$;
SELECT triojobs.add_partitions();

-- Not due yet. Without a table of their own an empty poll would walk every future row.
CREATE TABLE triojobs.scheduled (
    id           bigint      NOT NULL UNIQUE,
    queue        text        NOT NULL,
    priority     int         NOT NULL,
    run_at       timestamptz NOT NULL,
    attempts     int         NOT NULL,
    max_attempts int         NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX scheduled_order ON triojobs.scheduled (queue, run_at, id);

-- Due. The unique id turns a bug into one refused insert instead of a blocked queue, and makes
-- what addresses a job by its id O(log n).
CREATE TABLE triojobs.ready (
    id           bigint      NOT NULL UNIQUE,
    queue        text        NOT NULL,
    priority     int         NOT NULL,
    run_at       timestamptz NOT NULL,
    attempts     int         NOT NULL,
    max_attempts int         NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX ready_order ON triojobs.ready (queue, priority DESC, run_at, id);

-- Running. Carries what the way back needs, so that neither release nor retry joins the body.
CREATE TABLE triojobs.leases (
    id            bigint      PRIMARY KEY,
    claim_no      bigint      NOT NULL,
    group_id      uuid        NOT NULL,
    attempt       int         NOT NULL,
    max_attempts  int         NOT NULL,
    queue         text        NOT NULL,
    priority      int         NOT NULL,
    run_at        timestamptz NOT NULL,
    claimed_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    cancel_reason text
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0, fillfactor = 80);
-- Small: only the leases whose cancellation was asked for; each beat reads it.
CREATE INDEX leases_cancel ON triojobs.leases (group_id) WHERE cancel_reason IS NOT NULL;

-- A key and the job that holds it. `generation` counts changes of the holder and operators'
-- retries, so that a take-over that waited for one of them looks again.
CREATE TABLE triojobs.keys (
    queue      text   NOT NULL,
    key        text   NOT NULL,
    job_id     bigint NOT NULL,
    hold       text   NOT NULL CHECK (hold IN ('kept', 'ended', 'until')),
    until      timestamptz CHECK ((until IS NOT NULL) = (hold = 'until')),
    generation int    NOT NULL DEFAULT 1,
    PRIMARY KEY (queue, key)
);

-- One row per registration of a worker group; the id is never used again.
CREATE TABLE triojobs.worker_groups (
    id             uuid        PRIMARY KEY,
    name           text        NOT NULL,
    host           text        NOT NULL,
    pid            int         NOT NULL,
    version        text        NOT NULL,
    epoch          int         NOT NULL DEFAULT 1,
    lease_duration float8      NOT NULL CHECK (lease_duration > 0),
    lease_until    timestamptz NOT NULL,
    registered_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    closed_at      timestamptz
);
CREATE INDEX worker_groups_open ON triojobs.worker_groups (lease_until) WHERE closed_at IS NULL;

-- Which group sleeps on which queue. Unlogged: a group marks itself again after each reconnect.
CREATE UNLOGGED TABLE triojobs.waiting (
    group_id uuid NOT NULL,
    queue    text NOT NULL,
    PRIMARY KEY (queue, group_id)
);

-- The witness that a group's leases are what its process believes. Unlogged: crash recovery and the
-- promotion of a standby empty it, and those are the moments at which committed transactions may have
-- been lost (asynchronous commit, asynchronous replication); a clean restart keeps it. A claim needs the
-- witness of its group, and the group writes it anew after it has compared its leases. The start time
-- of the server would not do: when one backend crashes, the others are restarted under the same
-- postmaster, and a pooler hides restarts altogether.
CREATE UNLOGGED TABLE triojobs.witnesses (
    group_id uuid PRIMARY KEY
);

-- Status, decided in one place and under one snapshot.
CREATE VIEW triojobs.job_status AS
SELECT j.id, j.queue,
       CASE WHEN l.id IS NOT NULL THEN 'running'
            WHEN w.id IS NULL THEN o.status
            WHEN o.status = 'failed' THEN 'failed'
            ELSE 'pending' END AS status,
       coalesce(l.attempt, w.attempts, o.attempt, 0) AS attempts,
       j.max_attempts, j.priority,
       coalesce(l.run_at, w.run_at, j.run_at) AS run_at,
       j.key, j.metadata,
       CASE WHEN l.id IS NOT NULL THEN l.group_id
            WHEN w.id IS NULL THEN o.group_id END AS group_id,
       j.enqueued_at,
       CASE WHEN l.id IS NOT NULL THEN l.claimed_at
            WHEN w.id IS NULL THEN o.claimed_at END AS claimed_at,
       CASE WHEN l.id IS NULL AND w.id IS NULL THEN o.finished_at END AS finished_at,
       o.error AS last_error
FROM triojobs.jobs j
LEFT JOIN triojobs.leases l ON l.id = j.id
LEFT JOIN LATERAL (
    SELECT r.id, r.attempts, r.run_at FROM triojobs.ready r WHERE r.id = j.id
    UNION ALL
    SELECT s.id, s.attempts, s.run_at FROM triojobs.scheduled s WHERE s.id = j.id
    LIMIT 1
) w ON true
LEFT JOIN LATERAL (
    SELECT * FROM triojobs.outcomes x WHERE x.job_id = j.id ORDER BY x.no DESC LIMIT 1
) o ON true;
