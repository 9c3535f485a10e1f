-- 0005: what operators' reads need.
--
-- Why so few indexes. Each one is paid for by every job, so a read goes by what is there: ids are in the
-- order of the enqueues, and what waits or runs is in narrow tables. Left over are:
--
-- * Killed and cancelled jobs: few among millions that are done. A done or failed attempt costs the look
--   at the predicate, 50 ns, and no entry.
-- * The jobs of a key. One without a key costs nothing.
-- * The last attempts that ended, for throughput and latency. A block range index, since `no` grows with
--   the table: 150 ns an attempt (a B-tree took 740 ns, 5 % of the server's work for a job).
--
-- An index of the bodies by queue would cost 11 % of an enqueue in bulk; a page of a rare queue is found
-- by walking ids instead, a bounded number of them at a time.

CREATE INDEX outcomes_ended_badly ON triojobs.outcomes (job_id) WHERE status IN ('killed', 'cancelled');
CREATE INDEX outcomes_recent ON triojobs.outcomes USING brin (no);
CREATE INDEX jobs_key ON triojobs.jobs (key, id) WHERE key IS NOT NULL;

-- Returns an id below which no job was enqueued at or after `since`. Ids are in the order of the
-- enqueues, but for those that were handed out beforehand and enqueued later: so each probe takes the
-- earliest of a few neighbours, and the caller leaves room in `since` for the rest.
CREATE FUNCTION triojobs.first_id_since(since timestamptz) RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    low    bigint := coalesce((SELECT j.id FROM triojobs.jobs j ORDER BY j.id LIMIT 1), 0);
    high   bigint := coalesce((SELECT j.id FROM triojobs.jobs j ORDER BY j.id DESC LIMIT 1), 0) + 1;
    middle bigint;
    seen   timestamptz;
BEGIN
    WHILE low < high LOOP
        middle := low + (high - low) / 2;
        seen := (SELECT min(n.enqueued_at) FROM (
            SELECT j.enqueued_at FROM triojobs.jobs j
            WHERE j.id >= middle AND j.id < high ORDER BY j.id LIMIT 16
        ) n);
        IF seen < first_id_since.since THEN
            low := middle + 1;
        ELSE
            high := middle;  -- nothing is left there, or it is young enough
        END IF;
    END LOOP;
    RETURN low;
END $$;
