-- A database of version 4.
-- The database of version 3, upgraded: its trials and results are those of true searches.
CREATE TABLE public.nas_drivers (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    name text NOT NULL,
    started_at double precision NOT NULL,
    lease_until double precision NOT NULL,
    ended_at double precision
);
CREATE SEQUENCE public.nas_drivers_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.nas_drivers_id_seq OWNED BY public.nas_drivers.id;
CREATE TABLE public.nas_events (
    seq bigint NOT NULL,
    at double precision NOT NULL,
    study_id bigint,
    kind text NOT NULL,
    payload json NOT NULL
);
CREATE SEQUENCE public.nas_events_seq_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.nas_events_seq_seq OWNED BY public.nas_events.seq;
CREATE TABLE public.nas_latencies (
    device text NOT NULL,
    frame text NOT NULL,
    subject text NOT NULL,
    phase text NOT NULL,
    whole boolean NOT NULL,
    latency_ms double precision NOT NULL,
    spread_ms double precision NOT NULL,
    repetitions bigint NOT NULL
);
CREATE TABLE public.nas_layouts (
    key text NOT NULL,
    text text NOT NULL,
    layers json NOT NULL
);
CREATE TABLE public.nas_points (
    study_id bigint NOT NULL,
    number bigint NOT NULL,
    packed bytea NOT NULL
);
CREATE TABLE public.nas_repeat_claims (
    trial_id bigint NOT NULL,
    seed bigint NOT NULL,
    driver_id bigint NOT NULL
);
CREATE TABLE public.nas_repeats (
    trial_id bigint NOT NULL,
    seed bigint NOT NULL,
    evaluation_key text NOT NULL,
    rung bigint NOT NULL,
    quality double precision NOT NULL,
    scores json NOT NULL,
    details json NOT NULL,
    steps bigint NOT NULL,
    tokens bigint NOT NULL,
    train_s double precision NOT NULL,
    worker_s double precision NOT NULL
);
CREATE TABLE public.nas_results (
    trial_id bigint NOT NULL,
    rung bigint NOT NULL,
    quality double precision NOT NULL,
    scores json NOT NULL,
    details json NOT NULL,
    steps bigint NOT NULL,
    tokens bigint NOT NULL,
    train_s double precision NOT NULL,
    worker_s double precision NOT NULL,
    seed bigint NOT NULL
);
CREATE TABLE public.nas_schema (
    version bigint NOT NULL
);
CREATE TABLE public.nas_studies (
    id bigint NOT NULL,
    name text NOT NULL,
    config json NOT NULL,
    config_hash text NOT NULL,
    axes json NOT NULL,
    families json NOT NULL,
    created_at double precision NOT NULL
);
CREATE SEQUENCE public.nas_studies_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.nas_studies_id_seq OWNED BY public.nas_studies.id;
CREATE TABLE public.nas_trials (
    id bigint NOT NULL,
    study_id bigint NOT NULL,
    number bigint NOT NULL,
    state text NOT NULL,
    origin text NOT NULL,
    layout_key text NOT NULL,
    params json NOT NULL,
    sampler_attrs json NOT NULL,
    costs json NOT NULL,
    layer_costs json NOT NULL,
    evaluation_key text NOT NULL,
    attempts bigint NOT NULL,
    why text NOT NULL,
    created_at double precision NOT NULL,
    started_at double precision,
    ended_at double precision,
    driver_id bigint,
    failures bigint DEFAULT '0'::bigint NOT NULL,
    CONSTRAINT nas_trial_state CHECK ((state = ANY (ARRAY['waiting'::text, 'running'::text, 'done'::text, 'pruned'::text, 'unfit'::text, 'lost'::text, 'quarantined'::text])))
);
CREATE SEQUENCE public.nas_trials_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.nas_trials_id_seq OWNED BY public.nas_trials.id;
ALTER TABLE ONLY public.nas_drivers ALTER COLUMN id SET DEFAULT nextval('public.nas_drivers_id_seq'::regclass);
ALTER TABLE ONLY public.nas_events ALTER COLUMN seq SET DEFAULT nextval('public.nas_events_seq_seq'::regclass);
ALTER TABLE ONLY public.nas_studies ALTER COLUMN id SET DEFAULT nextval('public.nas_studies_id_seq'::regclass);
ALTER TABLE ONLY public.nas_trials ALTER COLUMN id SET DEFAULT nextval('public.nas_trials_id_seq'::regclass);
INSERT INTO public.nas_drivers VALUES (1, 1, 'pid 25446 on vm', 1795362549.6369884, 1795362609.6369884, NULL);
INSERT INTO public.nas_events VALUES (1, 1795345910.612011, 1, 'trial_waiting', '{"trial": 0, "layout": "2*full"}');
INSERT INTO public.nas_events VALUES (2, 1795345910.6439962, 1, 'trial_running', '{"trial": 0, "attempt": 1}');
INSERT INTO public.nas_events VALUES (3, 1795345910.7210026, 1, 'trial_pruned', '{"trial": 0, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (4, 1795345910.7449815, 1, 'trial_running', '{"trial": 0, "attempt": 2}');
INSERT INTO public.nas_events VALUES (5, 1795345910.8040035, 1, 'trial_done', '{"trial": 0, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (6, 1795345910.8419836, 1, 'trial_waiting', '{"trial": 1, "layout": "2*window"}');
INSERT INTO public.nas_events VALUES (7, 1795345910.8680143, 1, 'trial_running', '{"trial": 1, "attempt": 1}');
INSERT INTO public.nas_events VALUES (8, 1795345910.9490037, 1, 'trial_pruned', '{"trial": 1, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (9, 1795345910.9729826, 1, 'trial_running', '{"trial": 1, "attempt": 2}');
INSERT INTO public.nas_events VALUES (10, 1795345911.0390053, 1, 'trial_done', '{"trial": 1, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (11, 1795345911.074008, 1, 'trial_waiting', '{"trial": 2, "layout": "2*kda"}');
INSERT INTO public.nas_events VALUES (12, 1795345911.094004, 1, 'trial_running', '{"trial": 2, "attempt": 1}');
INSERT INTO public.nas_events VALUES (13, 1795345911.225003, 1, 'trial_pruned', '{"trial": 2, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (14, 1795345911.244999, 1, 'trial_running', '{"trial": 2, "attempt": 2}');
INSERT INTO public.nas_events VALUES (15, 1795345911.3689973, 1, 'trial_done', '{"trial": 2, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (16, 1795345911.4079833, 1, 'trial_waiting', '{"trial": 3, "layout": "kda window"}');
INSERT INTO public.nas_events VALUES (17, 1795345911.4379973, 1, 'trial_running', '{"trial": 3, "attempt": 1}');
INSERT INTO public.nas_events VALUES (18, 1795345911.5730195, 1, 'trial_pruned', '{"trial": 3, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (19, 1795345911.5969987, 1, 'trial_running', '{"trial": 3, "attempt": 2}');
INSERT INTO public.nas_events VALUES (20, 1795345911.6799996, 1, 'trial_done', '{"trial": 3, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (21, 1795345911.7199912, 1, 'trial_waiting', '{"trial": 4, "layout": "kda full[kv_heads=1]"}');
INSERT INTO public.nas_events VALUES (22, 1795345911.7419987, 1, 'trial_running', '{"trial": 4, "attempt": 1}');
INSERT INTO public.nas_events VALUES (23, 1795345911.8610084, 1, 'trial_pruned', '{"trial": 4, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (24, 1795345911.8909822, 1, 'trial_running', '{"trial": 4, "attempt": 2}');
INSERT INTO public.nas_events VALUES (25, 1795345911.989996, 1, 'trial_done', '{"trial": 4, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (26, 1795345912.0299876, 1, 'trial_waiting', '{"trial": 5, "layout": "window[kv_heads=1,size=32,soft_cap=50] full[kv_heads=1,soft_cap=50]"}');
INSERT INTO public.nas_events VALUES (27, 1795345912.0509892, 1, 'trial_running', '{"trial": 5, "attempt": 1}');
INSERT INTO public.nas_events VALUES (28, 1795345912.131013, 1, 'trial_pruned', '{"trial": 5, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (29, 1795345912.1599808, 1, 'trial_running', '{"trial": 5, "attempt": 2}');
INSERT INTO public.nas_events VALUES (30, 1795345912.2309923, 1, 'trial_done', '{"trial": 5, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (31, 1795345912.2750072, 1, 'trial_waiting', '{"trial": 6, "layout": "full[kv_heads=1] window"}');
INSERT INTO public.nas_events VALUES (32, 1795345912.2900143, 1, 'trial_running', '{"trial": 6, "attempt": 1}');
INSERT INTO public.nas_events VALUES (33, 1795345912.3650088, 1, 'trial_pruned', '{"trial": 6, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (34, 1795345912.3959885, 1, 'trial_running', '{"trial": 6, "attempt": 2}');
INSERT INTO public.nas_events VALUES (35, 1795345912.456982, 1, 'trial_done', '{"trial": 6, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (36, 1795345912.4970138, 1, 'trial_waiting', '{"trial": 7, "layout": "window[size=16] full[kv_heads=1]"}');
INSERT INTO public.nas_events VALUES (37, 1795345912.5279932, 1, 'trial_running', '{"trial": 7, "attempt": 1}');
INSERT INTO public.nas_events VALUES (38, 1795345912.622018, 1, 'trial_pruned', '{"trial": 7, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (39, 1795345912.6439855, 1, 'trial_running', '{"trial": 7, "attempt": 2}');
INSERT INTO public.nas_events VALUES (40, 1795345912.7110138, 1, 'trial_done', '{"trial": 7, "attempt": 2, "rung": 1, "quality": 0.005448190789473681}');
INSERT INTO public.nas_events VALUES (41, 1795345912.8369837, 1, 'trial_repeated', '{"trial": 7, "seed": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (42, 1795345912.9759893, 1, 'trial_repeated', '{"trial": 1, "seed": 1, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (43, 1795345913.1139889, 1, 'rungs_calibrated', '{"rungs": [{"rung": 0, "pairs": 8, "tau": 0.0, "low": 0.0, "high": 0.0, "by_chance": 0, "tau_by_chance": null, "trusted": true}]}');
INSERT INTO public.nas_events VALUES (44, 1795345958.4679976, 1, 'trial_waiting', '{"trial": 8, "layout": "window kda"}');
INSERT INTO public.nas_events VALUES (45, 1795345958.4889994, 1, 'trial_running', '{"trial": 8, "attempt": 1}');
INSERT INTO public.nas_events VALUES (46, 1795345958.5130186, 1, 'trial_pruned', '{"trial": 8, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (47, 1795345958.5310028, 1, 'trial_waiting', '{"trial": 9, "layout": "window full"}');
INSERT INTO public.nas_events VALUES (48, 1795345958.543998, 1, 'trial_running', '{"trial": 9, "attempt": 1}');
INSERT INTO public.nas_events VALUES (49, 1795345958.5520043, 1, 'trial_unfit', '{"trial": 9, "attempt": 1, "why": "the loss is NaN at step 2"}');
INSERT INTO public.nas_events VALUES (50, 1795345958.5720003, 1, 'trial_waiting', '{"trial": 10, "layout": "full kda"}');
INSERT INTO public.nas_events VALUES (51, 1795345958.5909903, 1, 'trial_running', '{"trial": 10, "attempt": 1}');
INSERT INTO public.nas_events VALUES (52, 1795345958.6150095, 1, 'trial_lost', '{"trial": 10, "attempt": 1, "why": "the worker was killed"}');
INSERT INTO public.nas_events VALUES (53, 1795345958.6239815, 1, 'trial_waiting', '{"trial": 11, "layout": "kda full"}');
INSERT INTO public.nas_events VALUES (54, 1795362549.6369884, 1, 'driver_started', '{"driver": 1, "name": "pid 25446 on vm"}');
INSERT INTO public.nas_events VALUES (55, 1795362550.8789852, 1, 'trial_waiting', '{"trial": 12, "layout": "5*full"}');
INSERT INTO public.nas_events VALUES (56, 1795362550.8840144, 1, 'trial_running', '{"trial": 12, "attempt": 1}');
INSERT INTO public.nas_events VALUES (57, 1795362550.8869915, 1, 'trial_requeued', '{"trial": 12, "attempt": 1, "why": "the worker died: WorkerCrashedError"}');
INSERT INTO public.nas_events VALUES (58, 1795362550.8890033, 1, 'trial_running', '{"trial": 12, "attempt": 2}');
INSERT INTO public.nas_events VALUES (59, 1795362550.891015, 1, 'trial_requeued', '{"trial": 12, "attempt": 2, "why": "the worker died: WorkerCrashedError"}');
INSERT INTO public.nas_events VALUES (60, 1795362550.8919806, 1, 'trial_running', '{"trial": 12, "attempt": 3}');
INSERT INTO public.nas_events VALUES (61, 1795362550.8939922, 1, 'trial_quarantined', '{"trial": 12, "attempt": 3, "why": "the worker died: WorkerCrashedError"}');
INSERT INTO public.nas_events VALUES (62, 1795362550.8970096, 1, 'trial_waiting', '{"trial": 13, "layout": "6*full"}');
INSERT INTO public.nas_events VALUES (63, 1795362550.9009929, 1, 'trial_running', '{"trial": 13, "attempt": 1}');
INSERT INTO public.nas_events VALUES (64, 1795362550.9030044, 1, 'trial_requeued', '{"trial": 13, "attempt": 1, "why": "interrupted"}');
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full', 'decode', false, 0.6977795000011611, 0.2344525000808062, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window', 'decode', false, 0.6446305000054053, 0.26303850000886086, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'kda', 'decode', false, 0.514034500042726, 0.10238437505449838, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window[kv_heads=1,size=32,soft_cap=50]', 'decode', false, 0.6518487499533876, 0.05956212510227488, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full[kv_heads=1,soft_cap=50]', 'decode', false, 0.6132164999144152, 0.16542812500119908, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full[kv_heads=1]', 'decode', false, 0.5970742499812332, 0.12731687502309796, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window[kv_heads=1,size=32]', 'decode', false, 0.6263585001988758, 0.04586175003851167, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window[kv_heads=1,learned_sink=true,size=32]', 'decode', false, 0.7080970000288289, 0.18957962498689085, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full[kv_heads=1,learned_sink=true]', 'decode', false, 0.850556500267885, 0.05195574971139649, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window[size=16]', 'decode', false, 0.6346955002527466, 0.059722499827330466, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', '2*(window[size=16] full[kv_heads=1])', 'decode', true, 3.3945140003197594, 2.324624999801017, 27);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', '4*window', 'decode', true, 4.3230445000972395, 2.4685832499358185, 22);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', '4*kda', 'decode', true, 2.1527090000290627, 2.1770702500134576, 38);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', '2*(kda window)', 'decode', true, 3.182251499879385, 2.321363250075592, 28);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', '2*(kda full[kv_heads=1])', 'decode', true, 2.4746069998400344, 2.261841500057926, 35);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', '2*(full[kv_heads=1] window)', 'decode', true, 2.7536825001561738, 2.261821124875496, 34);
INSERT INTO public.nas_layouts VALUES ('ddab2d4c83db92f3', '2*full', '[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('bf96093a67835145', '2*window', '[{"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('b338635f1b3eb27f', '2*kda', '[{"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('c96b891ea47c8043', 'kda window', '[{"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('1a5b47fb451f4557', 'kda full[kv_heads=1]', '[{"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('89a7df4f49f4fe70', 'window[kv_heads=1,size=32,soft_cap=50] full[kv_heads=1,soft_cap=50]', '[{"branches": [{"mixer": "window", "settings": {"kv_heads": 1, "size": 32, "soft_cap": 50}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {"kv_heads": 1, "soft_cap": 50}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('53ad04828d55f8f2', 'full[kv_heads=1] window', '[{"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('1426fa46244265f7', 'window[size=16] full[kv_heads=1]', '[{"branches": [{"mixer": "window", "settings": {"size": 16}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('796cc253309f2d21', 'window kda', '[{"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('224fbaac75d47939', 'window full', '[{"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('63b14f28c110cd6e', 'full kda', '[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('31bfe4afb51d41e4', 'kda full', '[{"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('f89881ee1c4ca557', '5*full', '[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('ac52ed8a8b3c51ca', '6*full', '[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_points VALUES (1, 0, '\x0000000000000000000000000000000000608aac35540640000000000000f040');
INSERT INTO public.nas_points VALUES (1, 1, '\x000000000000f03f000000000000000000e07024d0a00440000000000000c040');
INSERT INTO public.nas_points VALUES (1, 2, '\x000000000000004000000000000000000060d67af8720040000000000080d440');
INSERT INTO public.nas_points VALUES (1, 3, '\x0000000000000840000000000000000000a0a34fe4890240000000000080cc40');
INSERT INTO public.nas_points VALUES (1, 4, '\x000000000000104000000000000000000070faf719c70140000000000040d240');
INSERT INTO public.nas_points VALUES (1, 5, '\x0000000000001440000000000000000000d0370fb53d0440000000000000c840');
INSERT INTO public.nas_points VALUES (1, 6, '\x0000000000001840000000000000000000b0c7cc05de0340000000000000c840');
INSERT INTO public.nas_points VALUES (1, 7, '\x0000000000001c400ae53594d750663f0050973254b50340000000000000d040');
INSERT INTO public.nas_repeat_claims VALUES (1, 77, 1);
INSERT INTO public.nas_repeats VALUES (8, 1, '8f819dc3c393d0a9', 1, 0, '{"mqar": 0.0}', '{"layout": "window full[kv_heads=1]", "curves": {"mqar": [[0, 3.9156110286712646], [1, 3.8286945819854736], [2, 4.200879096984863], [3, 3.822359323501587]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.0400390625}, "new_steps": 4}', 4, 256, 0.035107002000131615, 0.08599448499990103);
INSERT INTO public.nas_repeats VALUES (2, 1, '56912c6fc2f0d1f3', 1, 0, '{"mqar": 0.0}', '{"layout": "2*window", "curves": {"mqar": [[0, 3.793468713760376], [1, 3.521796226501465], [2, 3.7954139709472656], [3, 3.593604326248169]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0546875, "mqar_accuracy_4": 0.0390625}, "new_steps": 4}', 4, 256, 0.04598594899971431, 0.10472589099981633);
INSERT INTO public.nas_results VALUES (1, 0, 0, '{"mqar": 0.0}', '{"layout": "2*full", "curves": {"mqar": [[0, 4.0211710929870605], [1, 4.254825592041016]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.0439453125}, "new_steps": 2}', 2, 128, 0.01124747500034573, 0.05884336600001916, 0);
INSERT INTO public.nas_results VALUES (1, 1, 0, '{"mqar": 0.0}', '{"layout": "2*full", "curves": {"mqar": [[0, 4.0211710929870605], [1, 4.254825592041016], [2, 3.892972707748413], [3, 3.7685155868530273]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.04296875}, "new_steps": 2}', 4, 256, 0.0227131440001358, 0.08274893199995859, 0);
INSERT INTO public.nas_results VALUES (2, 0, 0, '{"mqar": 0.0}', '{"layout": "2*window", "curves": {"mqar": [[0, 3.9781835079193115], [1, 4.174713611602783]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0234375, "mqar_accuracy_4": 0.037109375}, "new_steps": 2}', 2, 128, 0.02171773400004895, 0.07053394900003696, 0);
INSERT INTO public.nas_results VALUES (2, 1, 0, '{"mqar": 0.0}', '{"layout": "2*window", "curves": {"mqar": [[0, 3.9781835079193115], [1, 4.174713611602783], [2, 3.8710711002349854], [3, 3.7992684841156006]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.017578125, "mqar_accuracy_4": 0.03515625}, "new_steps": 2}', 4, 256, 0.03612958100029573, 0.09112900499985699, 0);
INSERT INTO public.nas_results VALUES (3, 0, 0, '{"mqar": 0.0}', '{"layout": "2*kda", "curves": {"mqar": [[0, 4.005904197692871], [1, 3.7559549808502197]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.041015625, "mqar_accuracy_4": 0.0341796875}, "new_steps": 2}', 2, 128, 0.02712489999976242, 0.11205384100003357, 0);
INSERT INTO public.nas_results VALUES (3, 1, 0, '{"mqar": 0.0}', '{"layout": "2*kda", "curves": {"mqar": [[0, 4.005904197692871], [1, 3.7559549808502197], [2, 4.031640529632568], [3, 3.9499566555023193]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.044921875, "mqar_accuracy_4": 0.037109375}, "new_steps": 2}', 4, 256, 0.05709540899943022, 0.2052918959998351, 0);
INSERT INTO public.nas_results VALUES (4, 0, 0, '{"mqar": 0.0}', '{"layout": "kda window", "curves": {"mqar": [[0, 3.8706753253936768], [1, 3.432546377182007]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.05078125, "mqar_accuracy_4": 0.0419921875}, "new_steps": 2}', 2, 128, 0.032720085000164545, 0.12089885499972297, 0);
INSERT INTO public.nas_results VALUES (4, 1, 0, '{"mqar": 0.0}', '{"layout": "kda window", "curves": {"mqar": [[0, 3.8706753253936768], [1, 3.432546377182007], [2, 3.7768189907073975], [3, 3.723031759262085]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.046875, "mqar_accuracy_4": 0.0458984375}, "new_steps": 2}', 4, 256, 0.05569258400009858, 0.18226311799935502, 0);
INSERT INTO public.nas_results VALUES (5, 0, 0, '{"mqar": 0.0}', '{"layout": "kda full[kv_heads=1]", "curves": {"mqar": [[0, 3.632042646408081], [1, 3.697972297668457]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.029296875, "mqar_accuracy_4": 0.02734375}, "new_steps": 2}', 2, 128, 0.028638078000312817, 0.10007759400014038, 0);
INSERT INTO public.nas_results VALUES (5, 1, 0, '{"mqar": 0.0}', '{"layout": "kda full[kv_heads=1]", "curves": {"mqar": [[0, 3.632042646408081], [1, 3.697972297668457], [2, 3.8483827114105225], [3, 3.828925371170044]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.03125, "mqar_accuracy_4": 0.029296875}, "new_steps": 2}', 4, 256, 0.052969166000366386, 0.15460923199998433, 0);
INSERT INTO public.nas_results VALUES (6, 0, 0, '{"mqar": 0.0}', '{"layout": "window[kv_heads=1,size=8,soft_cap=50] full[kv_heads=1,soft_cap=50]", "curves": {"mqar": [[0, 3.9262466430664062], [1, 3.994133710861206]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.025390625, "mqar_accuracy_4": 0.0400390625}, "new_steps": 2}', 2, 128, 0.015415839000070264, 0.058414078000168956, 0);
INSERT INTO public.nas_results VALUES (6, 1, 0, '{"mqar": 0.0}', '{"layout": "window[kv_heads=1,size=8,soft_cap=50] full[kv_heads=1,soft_cap=50]", "curves": {"mqar": [[0, 3.9262466430664062], [1, 3.994133710861206], [2, 3.658372640609741], [3, 3.611323595046997]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.03125, "mqar_accuracy_4": 0.048828125}, "new_steps": 2}', 4, 256, 0.03179122399978951, 0.09113289199967767, 0);
INSERT INTO public.nas_results VALUES (7, 0, 0, '{"mqar": 0.0}', '{"layout": "full[kv_heads=1] window", "curves": {"mqar": [[0, 3.9526755809783936], [1, 3.7550642490386963]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.037109375}, "new_steps": 2}', 2, 128, 0.016432869999789546, 0.05232430800015209, 0);
INSERT INTO public.nas_results VALUES (7, 1, 0, '{"mqar": 0.0}', '{"layout": "full[kv_heads=1] window", "curves": {"mqar": [[0, 3.9526755809783936], [1, 3.7550642490386963], [2, 3.7974674701690674], [3, 3.716557741165161]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.044921875, "mqar_accuracy_4": 0.0419921875}, "new_steps": 2}', 4, 256, 0.03225351099945328, 0.08517575700034286, 0);
INSERT INTO public.nas_results VALUES (8, 0, 0, '{"mqar": 0.0}', '{"layout": "window full[kv_heads=1]", "curves": {"mqar": [[0, 3.780937433242798], [1, 3.809495210647583]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.04296875, "mqar_accuracy_4": 0.0400390625}, "new_steps": 2}', 2, 128, 0.025495879000118293, 0.07895596499975, 0);
INSERT INTO public.nas_results VALUES (8, 1, 0.005448190789473681, '{"mqar": 0.005448190789473681}', '{"layout": "window full[kv_heads=1]", "curves": {"mqar": [[0, 3.780937433242798], [1, 3.809495210647583], [2, 3.878586530685425], [3, 3.8854055404663086]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0625, "mqar_accuracy_4": 0.0478515625}, "new_steps": 2}', 4, 256, 0.045649799999864626, 0.11302190999958839, 0);
INSERT INTO public.nas_results VALUES (9, 0, 0, '{"mqar": 0.0}', '{"layout": "2*full", "curves": {"mqar": [[0, 4.0211710929870605], [1, 4.254825592041016], [2, 3.892972707748413], [3, 3.7685155868530273]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.04296875}, "new_steps": 2}', 4, 256, 0.0227131440001358, 0.08274893199995859, 0);
INSERT INTO public.nas_schema VALUES (4);
INSERT INTO public.nas_studies VALUES (1, 'tiny', '{"seed": 0, "sampler": "random", "objectives": ["quality", "latency_ms", "kv_bytes"], "data": "stdlib", "rungs": {"shares": [0.5], "keep": 0.2, "chance": 0.1, "trust": 0.1}, "target": {"width": 64, "depth": 4, "train_length": 64, "context": 64, "batch": 1, "dtype": "bfloat16", "vocabulary": 64, "rotary_base": 10000.0, "rotary_scaling": "none", "rotary_factor": 1.0, "rotary_length": null, "fill": "stack", "contexts": [32, 128], "device": "cpu"}, "proxy": {"width": 16, "length": 16, "stem_taps": 4, "weight_decay": 0.1, "precision": "auto", "device": "cpu"}, "space": {"layers": 2, "mixers": ["full", "window", "kda"], "settings": {"full": {"kv_heads": [1]}, "window": {"size": [8, 16]}, "kda": {"head_dim": [16]}}, "channels": ["swiglu"], "sharing": "layer", "constraints": []}, "tasks": {"mqar": {"weight": 1.0, "steps": 4, "batch": 4, "learning_rates": [0.01], "pairs": []}}, "data_sha256": null}', '0b9a59f84fd80809', '[{"name": "quality", "maximise": true, "low": 0.0, "high": 1.0, "log": false, "unit": ""}, {"name": "latency_ms", "maximise": false, "low": 1.6449104001367232, "high": 4.252782501339425, "log": true, "unit": "ms"}, {"name": "kv_bytes", "maximise": false, "low": 6553.6, "high": 81920.0, "log": true, "unit": "bytes"}]', '{"full": "attention", "differential": "attention", "cross_layer": "attention", "window": "sparse", "strided": "sparse", "fixed": "sparse", "longformer": "sparse", "bigbird": "sparse", "moba": "sparse", "nsa": "sparse", "mosa": "sparse", "linformer": "sparse", "mla": "latent", "dsa": "latent", "transformer_xl": "memory", "compressive": "memory", "infini": "memory", "memory_tokens": "memory", "retrieval": "memory", "tree": "memory", "linear": "linear_attention", "performer": "linear_attention", "lolcats": "linear_attention", "retnet": "linear_attention", "lightning": "linear_attention", "gla": "linear_attention", "hgrn2": "linear_attention", "rwkv6": "linear_attention", "qla": "linear_attention", "loglinear": "linear_attention", "s4": "state_space", "s4d": "state_space", "mamba": "state_space", "mamba2": "state_space", "mamba3": "state_space", "gmu": "state_space", "deltanet": "delta", "gated_delta": "delta", "kda": "delta", "rwkv7": "delta", "mlstm": "recurrent", "rglru": "recurrent", "mingru": "recurrent", "sru": "recurrent", "lstm": "recurrent", "clockwork": "recurrent", "hyena": "convolution", "shortconv": "convolution"}', 1795345910.4419856);
INSERT INTO public.nas_trials VALUES (1, 1, 0, 'done', 'uniform', 'ddab2d4c83db92f3', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}', '[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]', '6d542ad1496d976b', 2, '', 1795345910.612011, 1795345910.744016, 1795345910.8040035, NULL, 0);
INSERT INTO public.nas_trials VALUES (2, 1, 1, 'done', 'uniform', 'bf96093a67835145', '{"0.mixer": "window", "0.window.size": 8, "1.mixer": "window", "1.window.size": 8}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 8192, "read_bytes": 8192, "flops_prefill": 396864.0, "flops_decode": 397312.0, "serial_steps": 0, "latency_ms": 2.5785220000216214, "kv_bytes@32": 8192, "kv_bytes@128": 8192, "tokens_per_s": 387.8190684398329, "latency_ms_whole": 4.3230445000972395}', '[{"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 0.6446305000054053}, {"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 0.6446305000054053}]', '2d6fa36044ad6c6e', 2, '', 1795345910.8419836, 1795345910.972017, 1795345911.0390053, NULL, 0);
INSERT INTO public.nas_trials VALUES (3, 1, 2, 'done', 'uniform', 'b338635f1b3eb27f', '{"0.mixer": "kda", "0.kda.head_dim": 16, "1.mixer": "kda", "1.kda.head_dim": 16}', '{}', '{"params": 215888, "active_params": 215888.0, "kv_bytes": 20992, "read_bytes": 20992, "flops_prefill": 662186.6666666666, "flops_decode": 458752.0, "serial_steps": 0, "latency_ms": 2.056138000170904, "kv_bytes@32": 20992, "kv_bytes@128": 20992, "tokens_per_s": 486.3486788906586, "latency_ms_whole": 2.1527090000290627}', '[{"params": 53972.0, "kv_bytes": 5248.0, "latency_ms": 0.514034500042726}, {"params": 53972.0, "kv_bytes": 5248.0, "latency_ms": 0.514034500042726}]', 'ed8365459d1d2573', 2, '', 1795345911.074008, 1795345911.244999, 1795345911.3689973, NULL, 0);
INSERT INTO public.nas_trials VALUES (4, 1, 3, 'done', 'search', 'c96b891ea47c8043', '{"0.mixer": "kda", "0.kda.head_dim": 16, "1.mixer": "window", "1.window.size": 8}', '{}', '{"params": 205480, "active_params": 205480.0, "kv_bytes": 14592, "read_bytes": 14592, "flops_prefill": 529525.3333333333, "flops_decode": 428032.0, "serial_steps": 0, "latency_ms": 2.3173300000962627, "kv_bytes@32": 14592, "kv_bytes@128": 14592, "tokens_per_s": 431.53111553316086, "latency_ms_whole": 3.182251499879385}', '[{"params": 53972.0, "kv_bytes": 5248.0, "latency_ms": 0.514034500042726}, {"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 0.6446305000054053}]', '3c22436f80403c47', 2, '', 1795345911.4079833, 1795345911.5959928, 1795345911.6799996, NULL, 0);
INSERT INTO public.nas_trials VALUES (5, 1, 4, 'done', 'search', '1a5b47fb451f4557', '{"0.mixer": "kda", "0.kda.head_dim": 16, "1.mixer": "full", "1.full.kv_heads": 1}', '{}', '{"params": 193192, "active_params": 193192.0, "kv_bytes": 18688, "read_bytes": 18688, "flops_prefill": 517717.3333333333, "flops_decode": 432128.0, "serial_steps": 0, "latency_ms": 2.2222175000479183, "kv_bytes@32": 14592, "kv_bytes@128": 26880, "tokens_per_s": 450.0009562423285, "latency_ms_whole": 2.4746069998400344}', '[{"params": 53972.0, "kv_bytes": 5248.0, "latency_ms": 0.514034500042726}, {"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 0.5970742499812332}]', '21023d5d7493bd39', 2, '', 1795345911.7189856, 1795345911.8859932, 1795345911.98899, NULL, 0);
INSERT INTO public.nas_trials VALUES (6, 1, 5, 'done', 'gemma-2-9b', '89a7df4f49f4fe70', '{}', '{}', '{"params": 170496, "active_params": 170496.0, "kv_bytes": 12288, "read_bytes": 12288, "flops_prefill": 369024.0, "flops_decode": 389120.0, "serial_steps": 0, "latency_ms": 2.5301304997356056, "kv_bytes@32": 8192, "kv_bytes@128": 20480, "tokens_per_s": 395.23653033094473}', '[{"params": 42624.0, "kv_bytes": 2048.0, "latency_ms": 0.6518487499533876}, {"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 0.6132164999144152}]', '85f88f686254cd62', 2, '', 1795345912.028016, 1795345912.1590152, 1795345912.2309923, NULL, 0);
INSERT INTO public.nas_trials VALUES (7, 1, 6, 'done', 'search', '53ad04828d55f8f2', '{"0.mixer": "full", "0.full.kv_heads": 1, "1.mixer": "window", "1.window.size": 8}', '{}', '{"params": 182784, "active_params": 182784.0, "kv_bytes": 12288, "read_bytes": 12288, "flops_prefill": 385056.0, "flops_decode": 401408.0, "serial_steps": 0, "latency_ms": 2.483409499973277, "kv_bytes@32": 8192, "kv_bytes@128": 20480, "tokens_per_s": 402.6722133465144, "latency_ms_whole": 2.7536825001561738}', '[{"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 0.5970742499812332}, {"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 0.6446305000054053}]', '46d38cb1cafb5f87', 2, '', 1795345912.2740016, 1795345912.3949826, 1795345912.456982, NULL, 0);
INSERT INTO public.nas_trials VALUES (8, 1, 7, 'done', 'search', '1426fa46244265f7', '{"0.mixer": "window", "0.window.size": 16, "1.mixer": "full", "1.full.kv_heads": 1}', '{}', '{"params": 182784, "active_params": 182784.0, "kv_bytes": 16384, "read_bytes": 16384, "flops_prefill": 388416.0, "flops_decode": 405504.0, "serial_steps": 0, "latency_ms": 2.4635395004679594, "kv_bytes@32": 12288, "kv_bytes@128": 24576, "tokens_per_s": 405.9200186601619, "latency_ms_whole": 3.3945140003197594}', '[{"params": 48768.0, "kv_bytes": 4096.0, "latency_ms": 0.6346955002527466}, {"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 0.5970742499812332}]', '0169ec8ce7f95d12', 2, '', 1795345912.4970138, 1795345912.6439855, 1795345912.7100081, NULL, 0);
INSERT INTO public.nas_trials VALUES (9, 1, 8, 'pruned', 'search', '796cc253309f2d21', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}', '[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]', 'made for window kda', 1, '', 1795345958.465986, 1795345958.4879935, 1795345958.5130186, NULL, 0);
INSERT INTO public.nas_trials VALUES (10, 1, 9, 'unfit', 'search', '224fbaac75d47939', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}', '[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]', 'made for window full', 1, 'the loss is NaN at step 2', 1795345958.5299969, 1795345958.543998, 1795345958.5520043, NULL, 0);
INSERT INTO public.nas_trials VALUES (11, 1, 10, 'lost', 'search', '63b14f28c110cd6e', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}', '[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]', 'made for full kda', 1, 'the worker was killed', 1795345958.5720003, 1795345958.5909903, 1795345958.6150095, NULL, 0);
INSERT INTO public.nas_trials VALUES (12, 1, 11, 'waiting', 'search', '31bfe4afb51d41e4', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}', '[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]', 'made for kda full', 0, '', 1795345958.6239815, NULL, NULL, NULL, 0);
INSERT INTO public.nas_trials VALUES (13, 1, 12, 'quarantined', 'search', 'f89881ee1c4ca557', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}', '[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]', 'kept-5', 3, 'the worker died: WorkerCrashedError', 1795362550.8780196, 1795362550.8919806, 1795362550.8939922, NULL, 3);
INSERT INTO public.nas_trials VALUES (14, 1, 13, 'waiting', 'search', 'ac52ed8a8b3c51ca', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}', '[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]', 'kept-6', 1, '', 1795362550.8970096, NULL, NULL, NULL, 0);
SELECT pg_catalog.setval('public.nas_drivers_id_seq', 1, true);
SELECT pg_catalog.setval('public.nas_events_seq_seq', 64, true);
SELECT pg_catalog.setval('public.nas_studies_id_seq', 1, true);
SELECT pg_catalog.setval('public.nas_trials_id_seq', 14, true);
ALTER TABLE ONLY public.nas_drivers
    ADD CONSTRAINT nas_drivers_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.nas_events
    ADD CONSTRAINT nas_events_pkey PRIMARY KEY (seq);
ALTER TABLE ONLY public.nas_latencies
    ADD CONSTRAINT nas_latencies_pkey PRIMARY KEY (device, frame, subject, phase, whole);
ALTER TABLE ONLY public.nas_layouts
    ADD CONSTRAINT nas_layouts_pkey PRIMARY KEY (key);
ALTER TABLE ONLY public.nas_points
    ADD CONSTRAINT nas_points_pkey PRIMARY KEY (study_id, number);
ALTER TABLE ONLY public.nas_repeat_claims
    ADD CONSTRAINT nas_repeat_claims_pkey PRIMARY KEY (trial_id, seed);
ALTER TABLE ONLY public.nas_repeats
    ADD CONSTRAINT nas_repeats_pkey PRIMARY KEY (trial_id, seed);
ALTER TABLE ONLY public.nas_results
    ADD CONSTRAINT nas_results_pkey PRIMARY KEY (trial_id, rung);
ALTER TABLE ONLY public.nas_schema
    ADD CONSTRAINT nas_schema_pkey PRIMARY KEY (version);
ALTER TABLE ONLY public.nas_studies
    ADD CONSTRAINT nas_studies_name_key UNIQUE (name);
ALTER TABLE ONLY public.nas_studies
    ADD CONSTRAINT nas_studies_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.nas_trials
    ADD CONSTRAINT nas_trials_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.nas_trials
    ADD CONSTRAINT nas_trials_study_id_number_key UNIQUE (study_id, number);
CREATE INDEX ix_nas_repeats_evaluation_key ON public.nas_repeats USING btree (evaluation_key);
CREATE INDEX ix_nas_trials_evaluation_key ON public.nas_trials USING btree (evaluation_key);
CREATE INDEX nas_drivers_by_study ON public.nas_drivers USING btree (study_id, ended_at);
CREATE INDEX nas_events_by_study ON public.nas_events USING btree (study_id, seq);
CREATE INDEX nas_trials_by_layout ON public.nas_trials USING btree (study_id, layout_key);
CREATE INDEX nas_trials_by_state ON public.nas_trials USING btree (study_id, state, number);
ALTER TABLE ONLY public.nas_drivers
    ADD CONSTRAINT nas_drivers_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.nas_studies(id);
ALTER TABLE ONLY public.nas_events
    ADD CONSTRAINT nas_events_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.nas_studies(id);
ALTER TABLE ONLY public.nas_points
    ADD CONSTRAINT nas_points_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.nas_studies(id);
ALTER TABLE ONLY public.nas_repeat_claims
    ADD CONSTRAINT nas_repeat_claims_driver_id_fkey FOREIGN KEY (driver_id) REFERENCES public.nas_drivers(id);
ALTER TABLE ONLY public.nas_repeat_claims
    ADD CONSTRAINT nas_repeat_claims_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.nas_trials(id);
ALTER TABLE ONLY public.nas_repeats
    ADD CONSTRAINT nas_repeats_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.nas_trials(id);
ALTER TABLE ONLY public.nas_results
    ADD CONSTRAINT nas_results_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.nas_trials(id);
ALTER TABLE ONLY public.nas_trials
    ADD CONSTRAINT nas_trial_driver FOREIGN KEY (driver_id) REFERENCES public.nas_drivers(id);
ALTER TABLE ONLY public.nas_trials
    ADD CONSTRAINT nas_trials_layout_key_fkey FOREIGN KEY (layout_key) REFERENCES public.nas_layouts(key);
ALTER TABLE ONLY public.nas_trials
    ADD CONSTRAINT nas_trials_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.nas_studies(id);
