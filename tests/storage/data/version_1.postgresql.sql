-- A database of version 1.
-- Made by a search of the release that had no repeats yet: four trials of two steps.
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
    CONSTRAINT nas_trial_state CHECK ((state = ANY (ARRAY['waiting'::text, 'running'::text, 'done'::text, 'pruned'::text, 'unfit'::text, 'lost'::text])))
);
CREATE SEQUENCE public.nas_trials_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.nas_trials_id_seq OWNED BY public.nas_trials.id;
ALTER TABLE ONLY public.nas_events ALTER COLUMN seq SET DEFAULT nextval('public.nas_events_seq_seq'::regclass);
ALTER TABLE ONLY public.nas_studies ALTER COLUMN id SET DEFAULT nextval('public.nas_studies_id_seq'::regclass);
ALTER TABLE ONLY public.nas_trials ALTER COLUMN id SET DEFAULT nextval('public.nas_trials_id_seq'::regclass);
INSERT INTO public.nas_events VALUES (1, 1795334162.918982, 1, 'trial_waiting', '{"trial": 0, "layout": "2*full"}');
INSERT INTO public.nas_events VALUES (2, 1795334162.9549906, 1, 'trial_running', '{"trial": 0, "attempt": 1}');
INSERT INTO public.nas_events VALUES (3, 1795334163.0579875, 1, 'trial_done', '{"trial": 0, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (4, 1795334163.090013, 1, 'trial_waiting', '{"trial": 1, "layout": "2*window"}');
INSERT INTO public.nas_events VALUES (5, 1795334163.1170094, 1, 'trial_running', '{"trial": 1, "attempt": 1}');
INSERT INTO public.nas_events VALUES (6, 1795334163.1969929, 1, 'trial_done', '{"trial": 1, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (7, 1795334163.221012, 1, 'trial_waiting', '{"trial": 2, "layout": "2*full[kv_heads=1]"}');
INSERT INTO public.nas_events VALUES (8, 1795334163.2490144, 1, 'trial_running', '{"trial": 2, "attempt": 1}');
INSERT INTO public.nas_events VALUES (9, 1795334163.3609831, 1, 'trial_done', '{"trial": 2, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_events VALUES (10, 1795334163.3850024, 1, 'trial_waiting', '{"trial": 3, "layout": "2*window[kv_heads=1,size=32]"}');
INSERT INTO public.nas_events VALUES (11, 1795334163.4179935, 1, 'trial_running', '{"trial": 3, "attempt": 1}');
INSERT INTO public.nas_events VALUES (12, 1795334163.5079951, 1, 'trial_done', '{"trial": 3, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full', 'decode', false, 1.4812927474849857, 1.171069252450252, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window', 'decode', false, 2.210372251283843, 2.159397379728034, 38);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full[kv_heads=1]', 'decode', false, 2.0097819942748174, 1.838552503613755, 39);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window[kv_heads=1,size=32]', 'decode', false, 1.8466172550688498, 1.7660473749856465, 44);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window[kv_heads=1,size=32,soft_cap=50]', 'decode', false, 1.7724589997669682, 0.474090498755686, 43);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full[kv_heads=1,soft_cap=50]', 'decode', false, 1.8615150038385764, 1.906879995658528, 43);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window[kv_heads=1,learned_sink=true,size=32]', 'decode', false, 1.8001564967562445, 2.242996128188679, 40);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full[kv_heads=1,learned_sink=true]', 'decode', false, 2.3716180003248155, 2.1980384990456514, 27);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'full[kv_heads=1]/none', 'decode', false, 0.9813094984565396, 0.37179537866904866, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', 'window/none', 'decode', false, 0.9820632512855809, 0.45796375343343243, 50);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', '4*full', 'decode', true, 4.614873003447428, 2.089878118567867, 18);
INSERT INTO public.nas_latencies VALUES ('cpu: AMD EPYC, 1 thread', 'width 64, context 64, batch 1, bfloat16, train length 64, longest 128', '4*window[kv_heads=1,size=32]', 'decode', true, 4.233533996739425, 2.1732220047852024, 23);
INSERT INTO public.nas_layouts VALUES ('ddab2d4c83db92f3', '2*full', '[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('bf96093a67835145', '2*window', '[{"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('ba39a6d88296b1a4', '2*full[kv_heads=1]', '[{"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_layouts VALUES ('5d5a6420ec5b5458', '2*window[kv_heads=1,size=32]', '[{"branches": [{"mixer": "window", "settings": {"kv_heads": 1, "size": 32}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {"kv_heads": 1, "size": 32}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO public.nas_results VALUES (1, 0, 0, '{"mqar": 0.0}', '{"layout": "2*full", "curves": {"mqar": [[0, 4.0211710929870605], [1, 4.254825592041016]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.0439453125}, "new_steps": 2}', 2, 128, 0.029976085002999753, 0.06640951600275002, 0);
INSERT INTO public.nas_results VALUES (2, 0, 0, '{"mqar": 0.0}', '{"layout": "2*window", "curves": {"mqar": [[0, 3.9781835079193115], [1, 4.174713611602783]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0234375, "mqar_accuracy_4": 0.037109375}, "new_steps": 2}', 2, 128, 0.019231275000493042, 0.0670190939999884, 0);
INSERT INTO public.nas_results VALUES (3, 0, 0, '{"mqar": 0.0}', '{"layout": "2*full[kv_heads=1]", "curves": {"mqar": [[0, 3.9050207138061523], [1, 3.95788836479187]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.02734375, "mqar_accuracy_4": 0.041015625}, "new_steps": 2}', 2, 128, 0.02319608700054232, 0.0943576039862819, 0);
INSERT INTO public.nas_results VALUES (4, 0, 0, '{"mqar": 0.0}', '{"layout": "2*window[kv_heads=1,size=8]", "curves": {"mqar": [[0, 3.950864791870117], [1, 3.998659372329712]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.029296875, "mqar_accuracy_4": 0.0400390625}, "new_steps": 2}', 2, 128, 0.023512547006248496, 0.06989576399791986, 0);
INSERT INTO public.nas_schema VALUES (1);
INSERT INTO public.nas_studies VALUES (1, 'old', '{"seed": 0, "sampler": "random", "objectives": ["quality", "latency_ms", "kv_bytes"], "data": "stdlib", "rungs": {"shares": [], "keep": 0.33, "chance": 0.1, "trust": 0.4}, "target": {"width": 64, "depth": 4, "train_length": 64, "context": 64, "batch": 1, "dtype": "bfloat16", "vocabulary": 64, "rotary_base": 10000.0, "rotary_scaling": "none", "rotary_factor": 1.0, "rotary_length": null, "fill": "stack", "contexts": [32, 128], "device": "cpu"}, "proxy": {"width": 16, "length": 16, "stem_taps": 4, "weight_decay": 0.1, "precision": "auto", "device": "cpu"}, "space": {"layers": 2, "mixers": ["full", "window"], "settings": {"full": {"kv_heads": [1]}, "window": {"size": [8]}}, "channels": ["none"], "sharing": "layer", "constraints": []}, "tasks": {"mqar": {"weight": 1.0, "steps": 2, "batch": 4, "learning_rates": [0.01], "pairs": []}}, "data_sha256": null}', '99fcc1fba8cd021c', '[{"name": "quality", "maximise": true, "low": 0.0, "high": 1.0, "log": false, "unit": ""}, {"name": "latency_ms", "maximise": false, "low": 3.1401903950609267, "high": 11.858090001624078, "log": true, "unit": "ms"}, {"name": "kv_bytes", "maximise": false, "low": 6553.6, "high": 81920.0, "log": true, "unit": "bytes"}]', '{"full": "attention", "differential": "attention", "cross_layer": "attention", "window": "sparse", "strided": "sparse", "fixed": "sparse", "longformer": "sparse", "bigbird": "sparse", "moba": "sparse", "nsa": "sparse", "mosa": "sparse", "linformer": "sparse", "mla": "latent", "dsa": "latent", "transformer_xl": "memory", "compressive": "memory", "infini": "memory", "memory_tokens": "memory", "retrieval": "memory", "tree": "memory", "linear": "linear_attention", "performer": "linear_attention", "lolcats": "linear_attention", "retnet": "linear_attention", "lightning": "linear_attention", "gla": "linear_attention", "hgrn2": "linear_attention", "rwkv6": "linear_attention", "qla": "linear_attention", "loglinear": "linear_attention", "s4": "state_space", "s4d": "state_space", "mamba": "state_space", "mamba2": "state_space", "mamba3": "state_space", "gmu": "state_space", "deltanet": "delta", "gated_delta": "delta", "kda": "delta", "rwkv7": "delta", "mlstm": "recurrent", "rglru": "recurrent", "mingru": "recurrent", "sru": "recurrent", "lstm": "recurrent", "clockwork": "recurrent", "hyena": "convolution", "shortconv": "convolution"}', 1795334162.7279952);
INSERT INTO public.nas_trials VALUES (1, 1, 0, 'done', 'uniform', 'ddab2d4c83db92f3', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 5.925170989939943, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 168.7715007208823, "latency_ms_whole": 4.614873003447428}', '[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 1.4812927474849857}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 1.4812927474849857}]', 'a514fc7980cad2a3', 1, '', 1795334162.913993, 1795334162.9539847, 1795334163.0579875);
INSERT INTO public.nas_trials VALUES (2, 1, 1, 'done', 'uniform', 'bf96093a67835145', '{}', '{}', '{"params": 195072, "active_params": 195072.0, "kv_bytes": 8192, "read_bytes": 8192, "flops_prefill": 396864.0, "flops_decode": 397312.0, "serial_steps": 0, "latency_ms": 8.841489005135372, "kv_bytes@32": 8192, "kv_bytes@128": 8192, "tokens_per_s": 113.1031209131373}', '[{"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 2.210372251283843}, {"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 2.210372251283843}]', 'abb755c47f043905', 1, '', 1795334163.0890071, 1795334163.1160035, 1795334163.1969929);
INSERT INTO public.nas_trials VALUES (3, 1, 2, 'done', 'llama-3', 'ba39a6d88296b1a4', '{}', '{}', '{"params": 170496, "active_params": 170496.0, "kv_bytes": 16384, "read_bytes": 16384, "flops_prefill": 373248.0, "flops_decode": 405504.0, "serial_steps": 0, "latency_ms": 8.03912797709927, "kv_bytes@32": 8192, "kv_bytes@128": 32768, "tokens_per_s": 124.39160103541809}', '[{"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 2.0097819942748174}, {"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 2.0097819942748174}]', '54e0c6ad58b6427d', 1, '', 1795334163.221012, 1795334163.2480085, 1795334163.3609831);
INSERT INTO public.nas_trials VALUES (4, 1, 3, 'done', 'mistral', '5d5a6420ec5b5458', '{}', '{}', '{"params": 170496, "active_params": 170496.0, "kv_bytes": 8192, "read_bytes": 8192, "flops_prefill": 364800.0, "flops_decode": 372736.0, "serial_steps": 0, "latency_ms": 7.386469020275399, "kv_bytes@32": 8192, "kv_bytes@128": 8192, "tokens_per_s": 135.38268383107842, "latency_ms_whole": 4.233533996739425}', '[{"params": 42624.0, "kv_bytes": 2048.0, "latency_ms": 1.8466172550688498}, {"params": 42624.0, "kv_bytes": 2048.0, "latency_ms": 1.8466172550688498}]', 'd5366f603d07e07b', 1, '', 1795334163.3850024, 1795334163.4179935, 1795334163.5069892);
SELECT pg_catalog.setval('public.nas_events_seq_seq', 12, true);
SELECT pg_catalog.setval('public.nas_studies_id_seq', 1, true);
SELECT pg_catalog.setval('public.nas_trials_id_seq', 4, true);
ALTER TABLE ONLY public.nas_events
    ADD CONSTRAINT nas_events_pkey PRIMARY KEY (seq);
ALTER TABLE ONLY public.nas_latencies
    ADD CONSTRAINT nas_latencies_pkey PRIMARY KEY (device, frame, subject, phase, whole);
ALTER TABLE ONLY public.nas_layouts
    ADD CONSTRAINT nas_layouts_pkey PRIMARY KEY (key);
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
CREATE INDEX ix_nas_trials_evaluation_key ON public.nas_trials USING btree (evaluation_key);
CREATE INDEX nas_events_by_study ON public.nas_events USING btree (study_id, seq);
CREATE INDEX nas_trials_by_layout ON public.nas_trials USING btree (study_id, layout_key);
CREATE INDEX nas_trials_by_state ON public.nas_trials USING btree (study_id, state, number);
ALTER TABLE ONLY public.nas_events
    ADD CONSTRAINT nas_events_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.nas_studies(id);
ALTER TABLE ONLY public.nas_results
    ADD CONSTRAINT nas_results_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.nas_trials(id);
ALTER TABLE ONLY public.nas_trials
    ADD CONSTRAINT nas_trials_layout_key_fkey FOREIGN KEY (layout_key) REFERENCES public.nas_layouts(key);
ALTER TABLE ONLY public.nas_trials
    ADD CONSTRAINT nas_trials_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.nas_studies(id);
