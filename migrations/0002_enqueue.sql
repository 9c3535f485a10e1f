-- 0002: enqueueing by key, and from SQL.
--
-- Why functions. A key that is taken needs several looks, each with a snapshot of its own (a
-- winner that committed after this statement began is invisible to it: 2,296 of 3,200 racing
-- calls got an empty answer from the one-statement form). A VOLATILE plpgsql function takes a
-- new snapshot for each of its statements, so the client, the outbox and plain SQL share one copy.

-- Inserts one body and its waiting row. False: a job of this id is already there.
CREATE FUNCTION triojobs.insert_job(
    job_id bigint, queue text, payload bytea, encoding text, key text, metadata jsonb,
    priority int, max_attempts int, timeout float8, deadline timestamptz, run_at timestamptz
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO triojobs.jobs AS j (id, queue, payload, encoding, key, metadata, priority, max_attempts,
                                    timeout, deadline, run_at)
    VALUES (insert_job.job_id, insert_job.queue, insert_job.payload, insert_job.encoding, insert_job.key,
            insert_job.metadata, insert_job.priority, insert_job.max_attempts, insert_job.timeout,
            insert_job.deadline, insert_job.run_at)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF insert_job.run_at > clock_timestamp() THEN
        INSERT INTO triojobs.scheduled (id, queue, priority, run_at, attempts, max_attempts)
        VALUES (insert_job.job_id, insert_job.queue, insert_job.priority, insert_job.run_at, 0,
                insert_job.max_attempts);
    ELSE
        INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)
        VALUES (insert_job.job_id, insert_job.queue, insert_job.priority, insert_job.run_at, 0,
                insert_job.max_attempts);
    END IF;
    RETURN true;
END $$;

-- Replaces the body of a job that has not started. True: replaced; false: it has started or is
-- gone; null: it moved while we looked, look again.
--
-- The waiting row is locked first and updated even when nothing in it changes: a claim whose
-- snapshot is older then misses the row; with a mere lock it would take the row and read the old
-- body although the replacement was reported.
CREATE FUNCTION triojobs.replace_job(
    job_id bigint, payload bytea, encoding text, metadata jsonb,
    priority int, max_attempts int, timeout float8, deadline timestamptz, run_at timestamptz
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    place text;
    due   boolean;
BEGIN
    PERFORM 1 FROM triojobs.ready r WHERE r.id = replace_job.job_id FOR UPDATE;
    IF FOUND THEN
        place := 'ready';
    ELSE
        PERFORM 1 FROM triojobs.scheduled s WHERE s.id = replace_job.job_id FOR UPDATE;
        IF FOUND THEN
            place := 'scheduled';
        END IF;
    END IF;
    IF EXISTS (SELECT FROM triojobs.outcomes o WHERE o.job_id = replace_job.job_id)
       OR EXISTS (SELECT FROM triojobs.leases l WHERE l.id = replace_job.job_id) THEN
        RETURN false;
    END IF;
    IF place IS NULL THEN
        RETURN NULL;
    END IF;
    UPDATE triojobs.jobs j
    SET payload = replace_job.payload, encoding = replace_job.encoding, metadata = replace_job.metadata,
        priority = replace_job.priority, max_attempts = replace_job.max_attempts,
        timeout = replace_job.timeout, deadline = replace_job.deadline, run_at = replace_job.run_at
    WHERE j.id = replace_job.job_id;
    due := replace_job.run_at <= clock_timestamp();
    IF place = 'ready' AND due THEN
        UPDATE triojobs.ready r
        SET priority = replace_job.priority, run_at = replace_job.run_at, max_attempts = replace_job.max_attempts
        WHERE r.id = replace_job.job_id;
    ELSIF place = 'scheduled' AND NOT due THEN
        UPDATE triojobs.scheduled s
        SET priority = replace_job.priority, run_at = replace_job.run_at, max_attempts = replace_job.max_attempts
        WHERE s.id = replace_job.job_id;
    ELSIF due THEN
        WITH moved AS (DELETE FROM triojobs.scheduled s WHERE s.id = replace_job.job_id RETURNING *)
        INSERT INTO triojobs.ready (id, queue, priority, run_at, attempts, max_attempts)
        SELECT m.id, m.queue, replace_job.priority, replace_job.run_at, m.attempts, replace_job.max_attempts
        FROM moved m;
    ELSE
        WITH moved AS (DELETE FROM triojobs.ready r WHERE r.id = replace_job.job_id RETURNING *)
        INSERT INTO triojobs.scheduled (id, queue, priority, run_at, attempts, max_attempts)
        SELECT m.id, m.queue, replace_job.priority, replace_job.run_at, m.attempts, replace_job.max_attempts
        FROM moved m;
    END IF;
    RETURN true;
END $$;

-- Enqueues one job under a key. `id` is the job that has the key now. With on_conflict 'raise'
-- and 'return' a taken key gives created = false and leaves the raising to the caller.
--
-- Whether the old holder still holds the key is decided in one statement, that is under one
-- snapshot, so a job on its way from one table to the next is seen in exactly one of them. The
-- take-over matches holder and generation: a rival's take-over or an operator's retry that we
-- waited for makes it miss, and we look again.
CREATE FUNCTION triojobs.enqueue_keyed(
    job_id bigint, queue text, key text, hold text, hold_seconds float8, on_conflict text,
    payload bytea, encoding text, metadata jsonb, priority int, max_attempts int,
    timeout float8, deadline timestamptz, run_at timestamptz,
    OUT id bigint, OUT created boolean, OUT replaced boolean
) LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    holder     bigint;
    seen       int;
    held       boolean;
    key_until  timestamptz := clock_timestamp() + enqueue_keyed.hold_seconds * interval '1 second';
    changed    boolean;
BEGIN
    id := enqueue_keyed.job_id; created := false; replaced := false;
    IF EXISTS (SELECT FROM triojobs.jobs j WHERE j.id = enqueue_keyed.job_id) THEN
        RETURN;  -- the same job_id again: the safe repetition after a lost reply
    END IF;
    FOR round IN 1 .. 10 LOOP
        INSERT INTO triojobs.keys AS k (queue, key, job_id, hold, until)
        VALUES (enqueue_keyed.queue, enqueue_keyed.key, enqueue_keyed.job_id, enqueue_keyed.hold, key_until)
        ON CONFLICT DO NOTHING;
        created := FOUND;
        IF NOT created THEN
            SELECT k.job_id, k.generation,
                   CASE k.hold
                       WHEN 'kept' THEN EXISTS (SELECT FROM triojobs.jobs j WHERE j.id = k.job_id)
                       WHEN 'ended' THEN EXISTS (SELECT FROM triojobs.ready r WHERE r.id = k.job_id)
                           OR EXISTS (SELECT FROM triojobs.scheduled s WHERE s.id = k.job_id)
                           OR EXISTS (SELECT FROM triojobs.leases l WHERE l.id = k.job_id)
                       ELSE k.until > clock_timestamp() END
            INTO holder, seen, held
            FROM triojobs.keys k WHERE k.queue = enqueue_keyed.queue AND k.key = enqueue_keyed.key;
            CONTINUE WHEN NOT FOUND;
            IF holder = enqueue_keyed.job_id THEN
                RETURN;  -- a rival enqueued this very job_id meanwhile
            END IF;
            IF held THEN
                id := holder;
                IF enqueue_keyed.on_conflict <> 'replace' THEN
                    RETURN;
                END IF;
                changed := triojobs.replace_job(holder, enqueue_keyed.payload, enqueue_keyed.encoding,
                    enqueue_keyed.metadata, enqueue_keyed.priority, enqueue_keyed.max_attempts,
                    enqueue_keyed.timeout, enqueue_keyed.deadline, enqueue_keyed.run_at);
                EXIT WHEN changed IS NULL AND round >= 3;
                CONTINUE WHEN changed IS NULL;
                replaced := changed;
                RETURN;
            END IF;
            UPDATE triojobs.keys k
            SET job_id = enqueue_keyed.job_id, hold = enqueue_keyed.hold, until = key_until,
                generation = k.generation + 1
            WHERE k.queue = enqueue_keyed.queue AND k.key = enqueue_keyed.key
              AND k.job_id = holder AND k.generation = seen;
            created := FOUND;
            CONTINUE WHEN NOT created;
        END IF;
        id := enqueue_keyed.job_id;
        created := triojobs.insert_job(enqueue_keyed.job_id, enqueue_keyed.queue, enqueue_keyed.payload,
            enqueue_keyed.encoding, enqueue_keyed.key, enqueue_keyed.metadata, enqueue_keyed.priority,
            enqueue_keyed.max_attempts, enqueue_keyed.timeout, enqueue_keyed.deadline, enqueue_keyed.run_at);
        RETURN;
    END LOOP;
    RAISE EXCEPTION 'the job under key % is changing hands; nothing was written', quote_literal(enqueue_keyed.key)
        USING ERRCODE = 'serialization_failure', HINT = 'repeat the call';
END $$;

-- The outbox for programs that are not Python: the job exists if and only if the caller's
-- transaction commits. Limits as in the Python API; a taken key raises unique_violation.
CREATE FUNCTION triojobs.enqueue(
    queue text, payload jsonb, run_at timestamptz DEFAULT now(), priority int DEFAULT 0,
    max_attempts int DEFAULT 5, key text DEFAULT NULL, on_conflict text DEFAULT 'raise',
    metadata jsonb DEFAULT '{}'
) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    job_id bigint;
    body   bytea := convert_to(enqueue.payload::text, 'UTF8');
    held   record;
    wrong  text;
    -- The plain name, as the listeners have it: regnamespace would quote a name like user.
    space  CONSTANT text := (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                             WHERE c.oid = 'triojobs.jobs'::regclass);
BEGIN
    wrong := CASE
        WHEN enqueue.queue IS NULL OR octet_length(enqueue.queue) NOT BETWEEN 1 AND 255
            THEN format('queue is %L, but must be 1 to 255 bytes', left(enqueue.queue, 120))
        WHEN enqueue.payload IS NULL THEN 'payload is NULL, but must be a JSON value'
        WHEN octet_length(body) > 1048576
            THEN format('payload is %s bytes, but must be at most 1048576', octet_length(body))
        WHEN enqueue.run_at IS NULL OR NOT isfinite(enqueue.run_at)
            THEN format('run_at is %L, but must be a finite time', enqueue.run_at)
        -- Beyond these years the time does not fit a datetime of Python in every session's time zone.
        WHEN enqueue.run_at < '1900-01-01 00:00:00+00' OR enqueue.run_at >= '9000-01-01 00:00:00+00'
            THEN format('run_at is %L, but must be in the years 1900 to 8999', enqueue.run_at)
        WHEN enqueue.priority IS NULL OR enqueue.priority < 0
            THEN format('priority is %L, but must be 0 to 2147483647', enqueue.priority)
        WHEN enqueue.max_attempts IS NULL OR enqueue.max_attempts < 1
            THEN format('max_attempts is %L, but must be at least 1', enqueue.max_attempts)
        WHEN octet_length(enqueue.key) > 1024
            THEN format('key is %s bytes, but must be at most 1024', octet_length(enqueue.key))
        WHEN enqueue.on_conflict IS NULL OR enqueue.on_conflict NOT IN ('raise', 'return', 'replace')
            THEN format('on_conflict is %L, but must be raise, return or replace', enqueue.on_conflict)
        WHEN enqueue.metadata IS NULL OR jsonb_typeof(enqueue.metadata) <> 'object'
            THEN 'metadata must be a JSON object'
        WHEN octet_length(enqueue.metadata::text) > 8192
            THEN format('metadata is %s bytes, but must be at most 8192', octet_length(enqueue.metadata::text))
    END;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'while enqueueing: %', wrong USING ERRCODE = 'invalid_parameter_value';
    END IF;
    job_id := nextval('triojobs.job_ids');
    IF enqueue.key IS NULL THEN
        PERFORM triojobs.insert_job(job_id, enqueue.queue, body, 'json', NULL, enqueue.metadata,
            enqueue.priority, enqueue.max_attempts, NULL, NULL, enqueue.run_at);
    ELSE
        held := triojobs.enqueue_keyed(job_id, enqueue.queue, enqueue.key, 'kept', NULL, enqueue.on_conflict,
            body, 'json', enqueue.metadata, enqueue.priority, enqueue.max_attempts, NULL, NULL, enqueue.run_at);
        IF NOT held.created AND enqueue.on_conflict = 'raise' THEN
            RAISE EXCEPTION 'while enqueueing: key % of queue % is held by job %',
                quote_literal(enqueue.key), quote_literal(enqueue.queue), held.id
                USING ERRCODE = 'unique_violation';
        END IF;
        job_id := held.id;
    END IF;
    -- We do not own the commit, so the hint goes inside the transaction, always: reading here who
    -- waits would lose a group that marks itself between now and the commit.
    PERFORM pg_notify(space, enqueue.queue);
    RETURN job_id;
END $$;
