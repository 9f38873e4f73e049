-- A database of version 1.
-- Made by a search of the release that had no repeats yet: four trials of two steps.
BEGIN TRANSACTION;
CREATE TABLE nas_events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	at DOUBLE NOT NULL, 
	study_id INTEGER, 
	kind TEXT NOT NULL, 
	payload JSON NOT NULL, 
	FOREIGN KEY(study_id) REFERENCES nas_studies (id)
);
INSERT INTO "nas_events" VALUES(1,1.79533416291898202891e+09,1,'trial_waiting','{"trial": 0, "layout": "2*full"}');
INSERT INTO "nas_events" VALUES(2,1.79533416295499062545e+09,1,'trial_running','{"trial": 0, "attempt": 1}');
INSERT INTO "nas_events" VALUES(3,1.79533416305798745153e+09,1,'trial_done','{"trial": 0, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(4,1.79533416309001302721e+09,1,'trial_waiting','{"trial": 1, "layout": "2*window"}');
INSERT INTO "nas_events" VALUES(5,1.79533416311700940132e+09,1,'trial_running','{"trial": 1, "attempt": 1}');
INSERT INTO "nas_events" VALUES(6,1.79533416319699287416e+09,1,'trial_done','{"trial": 1, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(7,1.79533416322101211553e+09,1,'trial_waiting','{"trial": 2, "layout": "2*full[kv_heads=1]"}');
INSERT INTO "nas_events" VALUES(8,1.79533416324901437758e+09,1,'trial_running','{"trial": 2, "attempt": 1}');
INSERT INTO "nas_events" VALUES(9,1.79533416336098313329e+09,1,'trial_done','{"trial": 2, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(10,1.79533416338500237461e+09,1,'trial_waiting','{"trial": 3, "layout": "2*window[kv_heads=1,size=32]"}');
INSERT INTO "nas_events" VALUES(11,1.79533416341799354548e+09,1,'trial_running','{"trial": 3, "attempt": 1}');
INSERT INTO "nas_events" VALUES(12,1.79533416350799512862e+09,1,'trial_done','{"trial": 3, "attempt": 1, "rung": 0, "quality": 0.0}');
CREATE TABLE nas_latencies (
	device TEXT NOT NULL, 
	frame TEXT NOT NULL, 
	subject TEXT NOT NULL, 
	phase TEXT NOT NULL, 
	whole BOOLEAN NOT NULL, 
	latency_ms DOUBLE NOT NULL, 
	spread_ms DOUBLE NOT NULL, 
	repetitions INTEGER NOT NULL, 
	PRIMARY KEY (device, frame, subject, phase, whole)
);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full','decode',0,1.48129274748498573899e+00,1.17106925245025195181e+00,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window','decode',0,2.21037225128384307026e+00,2.15939737972803413867e+00,38);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full[kv_heads=1]','decode',0,2.00978199427481740713e+00,1.83855250361375510692e+00,39);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window[kv_heads=1,size=32]','decode',0,1.84661725506884977221e+00,1.76604737498564645648e+00,44);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window[kv_heads=1,size=32,soft_cap=50]','decode',0,1.77245899976696819067e+00,0.474090498755686,43);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full[kv_heads=1,soft_cap=50]','decode',0,1.86151500383857637643e+00,1.90687999565852805972e+00,43);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window[kv_heads=1,learned_sink=true,size=32]','decode',0,1.8001564967562444508e+00,2.24299612818867899477e+00,40);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full[kv_heads=1,learned_sink=true]','decode',0,2.3716180003248155117e+00,2.19803849904565140604e+00,27);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full[kv_heads=1]/none','decode',0,9.81309498456539586186e-01,3.71795378669048659503e-01,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window/none','decode',0,9.82063251285580918192e-01,4.57963753433432430028e-01,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','4*full','decode',1,4.61487300344742834568e+00,2.08987811856786720454e+00,18);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','4*window[kv_heads=1,size=32]','decode',1,4.23353399673942476511e+00,2.17322200478520244359e+00,23);
CREATE TABLE nas_layouts (
	"key" TEXT NOT NULL, 
	text TEXT NOT NULL, 
	layers JSON NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "nas_layouts" VALUES('ddab2d4c83db92f3','2*full','[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('bf96093a67835145','2*window','[{"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('ba39a6d88296b1a4','2*full[kv_heads=1]','[{"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('5d5a6420ec5b5458','2*window[kv_heads=1,size=32]','[{"branches": [{"mixer": "window", "settings": {"kv_heads": 1, "size": 32}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {"kv_heads": 1, "size": 32}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
CREATE TABLE nas_results (
	trial_id INTEGER NOT NULL, 
	rung INTEGER NOT NULL, 
	quality DOUBLE NOT NULL, 
	scores JSON NOT NULL, 
	details JSON NOT NULL, 
	steps INTEGER NOT NULL, 
	tokens INTEGER NOT NULL, 
	train_s DOUBLE NOT NULL, 
	worker_s DOUBLE NOT NULL, 
	seed INTEGER NOT NULL, 
	PRIMARY KEY (trial_id, rung), 
	FOREIGN KEY(trial_id) REFERENCES nas_trials (id)
);
INSERT INTO "nas_results" VALUES(1,0,0.0,'{"mqar": 0.0}','{"layout": "2*full", "curves": {"mqar": [[0, 4.0211710929870605], [1, 4.254825592041016]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.0439453125}, "new_steps": 2}',2,128,2.99760850029997527599e-02,6.64095160027500241994e-02,0);
INSERT INTO "nas_results" VALUES(2,0,0.0,'{"mqar": 0.0}','{"layout": "2*window", "curves": {"mqar": [[0, 3.9781835079193115], [1, 4.174713611602783]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0234375, "mqar_accuracy_4": 0.037109375}, "new_steps": 2}',2,128,1.9231275000493042171e-02,0.0670190939999884,0);
INSERT INTO "nas_results" VALUES(3,0,0.0,'{"mqar": 0.0}','{"layout": "2*full[kv_heads=1]", "curves": {"mqar": [[0, 3.9050207138061523], [1, 3.95788836479187]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.02734375, "mqar_accuracy_4": 0.041015625}, "new_steps": 2}',2,128,2.3196087000542320311e-02,0.0943576039862819,0);
INSERT INTO "nas_results" VALUES(4,0,0.0,'{"mqar": 0.0}','{"layout": "2*window[kv_heads=1,size=8]", "curves": {"mqar": [[0, 3.950864791870117], [1, 3.998659372329712]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.029296875, "mqar_accuracy_4": 0.0400390625}, "new_steps": 2}',2,128,2.35125470062484964728e-02,6.98957639979198575019e-02,0);
CREATE TABLE nas_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "nas_schema" VALUES(1);
CREATE TABLE nas_studies (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	config JSON NOT NULL, 
	config_hash TEXT NOT NULL, 
	axes JSON NOT NULL, 
	families JSON NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "nas_studies" VALUES(1,'old','{"seed": 0, "sampler": "random", "objectives": ["quality", "latency_ms", "kv_bytes"], "data": "stdlib", "rungs": {"shares": [], "keep": 0.33, "chance": 0.1, "trust": 0.4}, "target": {"width": 64, "depth": 4, "train_length": 64, "context": 64, "batch": 1, "dtype": "bfloat16", "vocabulary": 64, "rotary_base": 10000.0, "rotary_scaling": "none", "rotary_factor": 1.0, "rotary_length": null, "fill": "stack", "contexts": [32, 128], "device": "cpu"}, "proxy": {"width": 16, "length": 16, "stem_taps": 4, "weight_decay": 0.1, "precision": "auto", "device": "cpu"}, "space": {"layers": 2, "mixers": ["full", "window"], "settings": {"full": {"kv_heads": [1]}, "window": {"size": [8]}}, "channels": ["none"], "sharing": "layer", "constraints": []}, "tasks": {"mqar": {"weight": 1.0, "steps": 2, "batch": 4, "learning_rates": [0.01], "pairs": []}}, "data_sha256": null}','99fcc1fba8cd021c','[{"name": "quality", "maximise": true, "low": 0.0, "high": 1.0, "log": false, "unit": ""}, {"name": "latency_ms", "maximise": false, "low": 3.1401903950609267, "high": 11.858090001624078, "log": true, "unit": "ms"}, {"name": "kv_bytes", "maximise": false, "low": 6553.6, "high": 81920.0, "log": true, "unit": "bytes"}]','{"full": "attention", "differential": "attention", "cross_layer": "attention", "window": "sparse", "strided": "sparse", "fixed": "sparse", "longformer": "sparse", "bigbird": "sparse", "moba": "sparse", "nsa": "sparse", "mosa": "sparse", "linformer": "sparse", "mla": "latent", "dsa": "latent", "transformer_xl": "memory", "compressive": "memory", "infini": "memory", "memory_tokens": "memory", "retrieval": "memory", "tree": "memory", "linear": "linear_attention", "performer": "linear_attention", "lolcats": "linear_attention", "retnet": "linear_attention", "lightning": "linear_attention", "gla": "linear_attention", "hgrn2": "linear_attention", "rwkv6": "linear_attention", "qla": "linear_attention", "loglinear": "linear_attention", "s4": "state_space", "s4d": "state_space", "mamba": "state_space", "mamba2": "state_space", "mamba3": "state_space", "gmu": "state_space", "deltanet": "delta", "gated_delta": "delta", "kda": "delta", "rwkv7": "delta", "mlstm": "recurrent", "rglru": "recurrent", "mingru": "recurrent", "sru": "recurrent", "lstm": "recurrent", "clockwork": "recurrent", "hyena": "convolution", "shortconv": "convolution"}',1.79533416272799515719e+09);
CREATE TABLE nas_trials (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	state TEXT NOT NULL, 
	origin TEXT NOT NULL, 
	layout_key TEXT NOT NULL, 
	params JSON NOT NULL, 
	sampler_attrs JSON NOT NULL, 
	costs JSON NOT NULL, 
	layer_costs JSON NOT NULL, 
	evaluation_key TEXT NOT NULL, 
	attempts INTEGER NOT NULL, 
	why TEXT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	started_at DOUBLE, 
	ended_at DOUBLE, 
	PRIMARY KEY (id), 
	UNIQUE (study_id, number), 
	CONSTRAINT nas_trial_state CHECK (state IN ('waiting', 'running', 'done', 'pruned', 'unfit', 'lost')), 
	FOREIGN KEY(study_id) REFERENCES nas_studies (id), 
	FOREIGN KEY(layout_key) REFERENCES nas_layouts ("key")
);
INSERT INTO "nas_trials" VALUES(1,1,0,'done','uniform','ddab2d4c83db92f3','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 5.925170989939943, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 168.7715007208823, "latency_ms_whole": 4.614873003447428}','[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 1.4812927474849857}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 1.4812927474849857}]','a514fc7980cad2a3',1,'',1.79533416291399288179e+09,1.79533416295398473737e+09,1.79533416305798745153e+09);
INSERT INTO "nas_trials" VALUES(2,1,1,'done','uniform','bf96093a67835145','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 8192, "read_bytes": 8192, "flops_prefill": 396864.0, "flops_decode": 397312.0, "serial_steps": 0, "latency_ms": 8.841489005135372, "kv_bytes@32": 8192, "kv_bytes@128": 8192, "tokens_per_s": 113.1031209131373}','[{"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 2.210372251283843}, {"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 2.210372251283843}]','abb755c47f043905',1,'',1.79533416308900713922e+09,1.79533416311600351336e+09,1.79533416319699287416e+09);
INSERT INTO "nas_trials" VALUES(3,1,2,'done','llama-3','ba39a6d88296b1a4','{}','{}','{"params": 170496, "active_params": 170496.0, "kv_bytes": 16384, "read_bytes": 16384, "flops_prefill": 373248.0, "flops_decode": 405504.0, "serial_steps": 0, "latency_ms": 8.03912797709927, "kv_bytes@32": 8192, "kv_bytes@128": 32768, "tokens_per_s": 124.39160103541809}','[{"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 2.0097819942748174}, {"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 2.0097819942748174}]','54e0c6ad58b6427d',1,'',1.79533416322101211553e+09,1.79533416324800848963e+09,1.79533416336098313329e+09);
INSERT INTO "nas_trials" VALUES(4,1,3,'done','mistral','5d5a6420ec5b5458','{}','{}','{"params": 170496, "active_params": 170496.0, "kv_bytes": 8192, "read_bytes": 8192, "flops_prefill": 364800.0, "flops_decode": 372736.0, "serial_steps": 0, "latency_ms": 7.386469020275399, "kv_bytes@32": 8192, "kv_bytes@128": 8192, "tokens_per_s": 135.38268383107842, "latency_ms_whole": 4.233533996739425}','[{"params": 42624.0, "kv_bytes": 2048.0, "latency_ms": 1.8466172550688498}, {"params": 42624.0, "kv_bytes": 2048.0, "latency_ms": 1.8466172550688498}]','d5366f603d07e07b',1,'',1.79533416338500237461e+09,1.79533416341799354548e+09,1.79533416350698924067e+09);
CREATE INDEX nas_trials_by_layout ON nas_trials (study_id, layout_key);
CREATE INDEX ix_nas_trials_evaluation_key ON nas_trials (evaluation_key);
CREATE INDEX nas_trials_by_state ON nas_trials (study_id, state, number);
CREATE INDEX nas_events_by_study ON nas_events (study_id, seq);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('nas_events',12);
COMMIT;
