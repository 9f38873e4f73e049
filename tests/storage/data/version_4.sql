-- A database of version 4.
-- The database of version 3, upgraded: its trials and results are those of true searches.
BEGIN TRANSACTION;
CREATE TABLE nas_drivers (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	started_at DOUBLE NOT NULL, 
	lease_until DOUBLE NOT NULL, 
	ended_at DOUBLE, 
	PRIMARY KEY (id), 
	FOREIGN KEY(study_id) REFERENCES nas_studies (id)
);
INSERT INTO "nas_drivers" VALUES(1,1,'pid 25446 on vm',1.79536254963698840144e+09,1.79536260963698840139e+09,NULL);
CREATE TABLE nas_events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	at DOUBLE NOT NULL, 
	study_id INTEGER, 
	kind TEXT NOT NULL, 
	payload JSON NOT NULL, 
	FOREIGN KEY(study_id) REFERENCES nas_studies (id)
);
INSERT INTO "nas_events" VALUES(1,1.79534591061201095583e+09,1,'trial_waiting','{"trial": 0, "layout": "2*full"}');
INSERT INTO "nas_events" VALUES(2,1.79534591064399623875e+09,1,'trial_running','{"trial": 0, "attempt": 1}');
INSERT INTO "nas_events" VALUES(3,1.79534591072100257872e+09,1,'trial_pruned','{"trial": 0, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(4,1.79534591074498152732e+09,1,'trial_running','{"trial": 0, "attempt": 2}');
INSERT INTO "nas_events" VALUES(5,1.79534591080400347711e+09,1,'trial_done','{"trial": 0, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(6,1.79534591084198355678e+09,1,'trial_waiting','{"trial": 1, "layout": "2*window"}');
INSERT INTO "nas_events" VALUES(7,1.79534591086801433566e+09,1,'trial_running','{"trial": 1, "attempt": 1}');
INSERT INTO "nas_events" VALUES(8,1.79534591094900369641e+09,1,'trial_pruned','{"trial": 1, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(9,1.79534591097298264501e+09,1,'trial_running','{"trial": 1, "attempt": 2}');
INSERT INTO "nas_events" VALUES(10,1.7953459110390052795e+09,1,'trial_done','{"trial": 1, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(11,1.79534591107400798805e+09,1,'trial_waiting','{"trial": 2, "layout": "2*kda"}');
INSERT INTO "nas_events" VALUES(12,1.79534591109400391579e+09,1,'trial_running','{"trial": 2, "attempt": 1}');
INSERT INTO "nas_events" VALUES(13,1.7953459112250030041e+09,1,'trial_pruned','{"trial": 2, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(14,1.79534591124499893185e+09,1,'trial_running','{"trial": 2, "attempt": 2}');
INSERT INTO "nas_events" VALUES(15,1.7953459113689973354e+09,1,'trial_done','{"trial": 2, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(16,1.79534591140798330307e+09,1,'trial_waiting','{"trial": 3, "layout": "kda window"}');
INSERT INTO "nas_events" VALUES(17,1.79534591143799734111e+09,1,'trial_running','{"trial": 3, "attempt": 1}');
INSERT INTO "nas_events" VALUES(18,1.79534591157301950462e+09,1,'trial_pruned','{"trial": 3, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(19,1.79534591159699869148e+09,1,'trial_running','{"trial": 3, "attempt": 2}');
INSERT INTO "nas_events" VALUES(20,1.79534591167999958987e+09,1,'trial_done','{"trial": 3, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(21,1.79534591171999120709e+09,1,'trial_waiting','{"trial": 4, "layout": "kda full[kv_heads=1]"}');
INSERT INTO "nas_events" VALUES(22,1.79534591174199867251e+09,1,'trial_running','{"trial": 4, "attempt": 1}');
INSERT INTO "nas_events" VALUES(23,1.79534591186100840566e+09,1,'trial_pruned','{"trial": 4, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(24,1.79534591189098215102e+09,1,'trial_running','{"trial": 4, "attempt": 2}');
INSERT INTO "nas_events" VALUES(25,1.79534591198999595642e+09,1,'trial_done','{"trial": 4, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(26,1.79534591202998757364e+09,1,'trial_waiting','{"trial": 5, "layout": "window[kv_heads=1,size=32,soft_cap=50] full[kv_heads=1,soft_cap=50]"}');
INSERT INTO "nas_events" VALUES(27,1.79534591205098915099e+09,1,'trial_running','{"trial": 5, "attempt": 1}');
INSERT INTO "nas_events" VALUES(28,1.79534591213101291659e+09,1,'trial_pruned','{"trial": 5, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(29,1.79534591215998077387e+09,1,'trial_running','{"trial": 5, "attempt": 2}');
INSERT INTO "nas_events" VALUES(30,1.79534591223099231722e+09,1,'trial_done','{"trial": 5, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(31,1.7953459122750072479e+09,1,'trial_waiting','{"trial": 6, "layout": "full[kv_heads=1] window"}');
INSERT INTO "nas_events" VALUES(32,1.79534591229001426696e+09,1,'trial_running','{"trial": 6, "attempt": 1}');
INSERT INTO "nas_events" VALUES(33,1.79534591236500883104e+09,1,'trial_pruned','{"trial": 6, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(34,1.79534591239598846439e+09,1,'trial_running','{"trial": 6, "attempt": 2}');
INSERT INTO "nas_events" VALUES(35,1.79534591245698189735e+09,1,'trial_done','{"trial": 6, "attempt": 2, "rung": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(36,1.7953459124970138073e+09,1,'trial_waiting','{"trial": 7, "layout": "window[size=16] full[kv_heads=1]"}');
INSERT INTO "nas_events" VALUES(37,1.79534591252799320213e+09,1,'trial_running','{"trial": 7, "attempt": 1}');
INSERT INTO "nas_events" VALUES(38,1.79534591262201809885e+09,1,'trial_pruned','{"trial": 7, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(39,1.79534591264398550982e+09,1,'trial_running','{"trial": 7, "attempt": 2}');
INSERT INTO "nas_events" VALUES(40,1.79534591271101379387e+09,1,'trial_done','{"trial": 7, "attempt": 2, "rung": 1, "quality": 0.005448190789473681}');
INSERT INTO "nas_events" VALUES(41,1.79534591283698368073e+09,1,'trial_repeated','{"trial": 7, "seed": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(42,1.79534591297598934171e+09,1,'trial_repeated','{"trial": 1, "seed": 1, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(43,1.79534591311398887634e+09,1,'rungs_calibrated','{"rungs": [{"rung": 0, "pairs": 8, "tau": 0.0, "low": 0.0, "high": 0.0, "by_chance": 0, "tau_by_chance": null, "trusted": true}]}');
INSERT INTO "nas_events" VALUES(44,1.79534595846799755096e+09,1,'trial_waiting','{"trial": 8, "layout": "window kda"}');
INSERT INTO "nas_events" VALUES(45,1.7953459584889993667e+09,1,'trial_running','{"trial": 8, "attempt": 1}');
INSERT INTO "nas_events" VALUES(46,1.79534595851301860807e+09,1,'trial_pruned','{"trial": 8, "attempt": 1, "rung": 0, "quality": 0.0}');
INSERT INTO "nas_events" VALUES(47,1.79534595853100275991e+09,1,'trial_waiting','{"trial": 9, "layout": "window full"}');
INSERT INTO "nas_events" VALUES(48,1.79534595854399800299e+09,1,'trial_running','{"trial": 9, "attempt": 1}');
INSERT INTO "nas_events" VALUES(49,1.7953459585520043373e+09,1,'trial_unfit','{"trial": 9, "attempt": 1, "why": "the loss is NaN at step 2"}');
INSERT INTO "nas_events" VALUES(50,1.79534595857200026509e+09,1,'trial_waiting','{"trial": 10, "layout": "full kda"}');
INSERT INTO "nas_events" VALUES(51,1.79534595859099030496e+09,1,'trial_running','{"trial": 10, "attempt": 1}');
INSERT INTO "nas_events" VALUES(52,1.79534595861500954625e+09,1,'trial_lost','{"trial": 10, "attempt": 1, "why": "the worker was killed"}');
INSERT INTO "nas_events" VALUES(53,1.79534595862398147587e+09,1,'trial_waiting','{"trial": 11, "layout": "kda full"}');
INSERT INTO "nas_events" VALUES(54,1.79536254963698840144e+09,1,'driver_started','{"driver": 1, "name": "pid 25446 on vm"}');
INSERT INTO "nas_events" VALUES(55,1.79536255087898516651e+09,1,'trial_waiting','{"trial": 12, "layout": "5*full"}');
INSERT INTO "nas_events" VALUES(56,1.79536255088401436805e+09,1,'trial_running','{"trial": 12, "attempt": 1}');
INSERT INTO "nas_events" VALUES(57,1.79536255088699150082e+09,1,'trial_requeued','{"trial": 12, "attempt": 1, "why": "the worker died: WorkerCrashedError"}');
INSERT INTO "nas_events" VALUES(58,1.79536255088900327677e+09,1,'trial_running','{"trial": 12, "attempt": 2}');
INSERT INTO "nas_events" VALUES(59,1.7953625508910150528e+09,1,'trial_requeued','{"trial": 12, "attempt": 2, "why": "the worker died: WorkerCrashedError"}');
INSERT INTO "nas_events" VALUES(60,1.79536255089198064803e+09,1,'trial_running','{"trial": 12, "attempt": 3}');
INSERT INTO "nas_events" VALUES(61,1.79536255089399218558e+09,1,'trial_quarantined','{"trial": 12, "attempt": 3, "why": "the worker died: WorkerCrashedError"}');
INSERT INTO "nas_events" VALUES(62,1.79536255089700961108e+09,1,'trial_waiting','{"trial": 13, "layout": "6*full"}');
INSERT INTO "nas_events" VALUES(63,1.79536255090099287033e+09,1,'trial_running','{"trial": 13, "attempt": 1}');
INSERT INTO "nas_events" VALUES(64,1.79536255090300440788e+09,1,'trial_requeued','{"trial": 13, "attempt": 1, "why": "interrupted"}');
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
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full','decode',0,6.97779500001161068212e-01,2.34452500080806203186e-01,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window','decode',0,6.44630500005405338015e-01,2.63038500008860864909e-01,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','kda','decode',0,0.514034500042726,1.02384375054498377721e-01,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window[kv_heads=1,size=32,soft_cap=50]','decode',0,6.51848749953387596178e-01,5.95621251022748765535e-02,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full[kv_heads=1,soft_cap=50]','decode',0,6.13216499914415180683e-01,1.65428125001199077814e-01,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full[kv_heads=1]','decode',0,5.97074249981233151629e-01,1.27316875023097964003e-01,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window[kv_heads=1,size=32]','decode',0,6.26358500198875844944e-01,4.58617500385116727557e-02,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window[kv_heads=1,learned_sink=true,size=32]','decode',0,7.08097000028828915674e-01,1.89579624986890848958e-01,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','full[kv_heads=1,learned_sink=true]','decode',0,0.850556500267885,5.19557497113964927848e-02,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','window[size=16]','decode',0,6.34695500252746569458e-01,5.97224998273304663598e-02,50);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','2*(window[size=16] full[kv_heads=1])','decode',1,3.39451400031975936144e+00,2.32462499980101711116e+00,27);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','4*window','decode',1,4.32304450009723950643e+00,2.46858324993581845774e+00,22);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','4*kda','decode',1,2.15270900002906273584e+00,2.17707025001345755299e+00,38);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','2*(kda window)','decode',1,3.18225149987938493723e+00,2.32136325007559207733e+00,28);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','2*(kda full[kv_heads=1])','decode',1,2.47460699984003440476e+00,2.26184150005792616866e+00,35);
INSERT INTO "nas_latencies" VALUES('cpu: AMD EPYC, 1 thread','width 64, context 64, batch 1, bfloat16, train length 64, longest 128','2*(full[kv_heads=1] window)','decode',1,2.75368250015617377357e+00,2.26182112487549602519e+00,34);
CREATE TABLE nas_layouts (
	"key" TEXT NOT NULL, 
	text TEXT NOT NULL, 
	layers JSON NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "nas_layouts" VALUES('ddab2d4c83db92f3','2*full','[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('bf96093a67835145','2*window','[{"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('b338635f1b3eb27f','2*kda','[{"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('c96b891ea47c8043','kda window','[{"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('1a5b47fb451f4557','kda full[kv_heads=1]','[{"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('89a7df4f49f4fe70','window[kv_heads=1,size=32,soft_cap=50] full[kv_heads=1,soft_cap=50]','[{"branches": [{"mixer": "window", "settings": {"kv_heads": 1, "size": 32, "soft_cap": 50}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {"kv_heads": 1, "soft_cap": 50}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('53ad04828d55f8f2','full[kv_heads=1] window','[{"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('1426fa46244265f7','window[size=16] full[kv_heads=1]','[{"branches": [{"mixer": "window", "settings": {"size": 16}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {"kv_heads": 1}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('796cc253309f2d21','window kda','[{"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('224fbaac75d47939','window full','[{"branches": [{"mixer": "window", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('63b14f28c110cd6e','full kda','[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('31bfe4afb51d41e4','kda full','[{"branches": [{"mixer": "kda", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('f89881ee1c4ca557','5*full','[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
INSERT INTO "nas_layouts" VALUES('ac52ed8a8b3c51ca','6*full','[{"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}, {"branches": [{"mixer": "full", "settings": {}}], "channel": {"mixer": "swiglu", "settings": {}}}]');
CREATE TABLE nas_points (
	study_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	packed BLOB NOT NULL, 
	PRIMARY KEY (study_id, number), 
	FOREIGN KEY(study_id) REFERENCES nas_studies (id)
);
INSERT INTO "nas_points" VALUES(1,0,X'0000000000000000000000000000000000608AAC35540640000000000000F040');
INSERT INTO "nas_points" VALUES(1,1,X'000000000000F03F000000000000000000E07024D0A00440000000000000C040');
INSERT INTO "nas_points" VALUES(1,2,X'000000000000004000000000000000000060D67AF8720040000000000080D440');
INSERT INTO "nas_points" VALUES(1,3,X'0000000000000840000000000000000000A0A34FE4890240000000000080CC40');
INSERT INTO "nas_points" VALUES(1,4,X'000000000000104000000000000000000070FAF719C70140000000000040D240');
INSERT INTO "nas_points" VALUES(1,5,X'0000000000001440000000000000000000D0370FB53D0440000000000000C840');
INSERT INTO "nas_points" VALUES(1,6,X'0000000000001840000000000000000000B0C7CC05DE0340000000000000C840');
INSERT INTO "nas_points" VALUES(1,7,X'0000000000001C400AE53594D750663F0050973254B50340000000000000D040');
CREATE TABLE nas_repeat_claims (
	trial_id INTEGER NOT NULL, 
	seed INTEGER NOT NULL, 
	driver_id INTEGER NOT NULL, 
	PRIMARY KEY (trial_id, seed), 
	FOREIGN KEY(trial_id) REFERENCES nas_trials (id), 
	FOREIGN KEY(driver_id) REFERENCES nas_drivers (id)
);
INSERT INTO "nas_repeat_claims" VALUES(1,77,1);
CREATE TABLE nas_repeats (
	trial_id INTEGER NOT NULL, 
	seed INTEGER NOT NULL, 
	evaluation_key TEXT NOT NULL, 
	rung INTEGER NOT NULL, 
	quality DOUBLE NOT NULL, 
	scores JSON NOT NULL, 
	details JSON NOT NULL, 
	steps INTEGER NOT NULL, 
	tokens INTEGER NOT NULL, 
	train_s DOUBLE NOT NULL, 
	worker_s DOUBLE NOT NULL, 
	PRIMARY KEY (trial_id, seed), 
	FOREIGN KEY(trial_id) REFERENCES nas_trials (id)
);
INSERT INTO "nas_repeats" VALUES(8,1,'8f819dc3c393d0a9',1,0.0,'{"mqar": 0.0}','{"layout": "window full[kv_heads=1]", "curves": {"mqar": [[0, 3.9156110286712646], [1, 3.8286945819854736], [2, 4.200879096984863], [3, 3.822359323501587]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.0400390625}, "new_steps": 4}',4,256,3.51070020001316152047e-02,8.59944849999010330066e-02);
INSERT INTO "nas_repeats" VALUES(2,1,'56912c6fc2f0d1f3',1,0.0,'{"mqar": 0.0}','{"layout": "2*window", "curves": {"mqar": [[0, 3.793468713760376], [1, 3.521796226501465], [2, 3.7954139709472656], [3, 3.593604326248169]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0546875, "mqar_accuracy_4": 0.0390625}, "new_steps": 4}',4,256,4.59859489997143100481e-02,1.04725890999816328985e-01);
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
INSERT INTO "nas_results" VALUES(1,0,0.0,'{"mqar": 0.0}','{"layout": "2*full", "curves": {"mqar": [[0, 4.0211710929870605], [1, 4.254825592041016]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.0439453125}, "new_steps": 2}',2,128,1.12474750003457302227e-02,5.88433660000191594008e-02,0);
INSERT INTO "nas_results" VALUES(1,1,0.0,'{"mqar": 0.0}','{"layout": "2*full", "curves": {"mqar": [[0, 4.0211710929870605], [1, 4.254825592041016], [2, 3.892972707748413], [3, 3.7685155868530273]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.04296875}, "new_steps": 2}',4,256,0.0227131440001358,8.27489319999585859477e-02,0);
INSERT INTO "nas_results" VALUES(2,0,0.0,'{"mqar": 0.0}','{"layout": "2*window", "curves": {"mqar": [[0, 3.9781835079193115], [1, 4.174713611602783]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0234375, "mqar_accuracy_4": 0.037109375}, "new_steps": 2}',2,128,2.17177340000489493831e-02,7.05339490000369551125e-02,0);
INSERT INTO "nas_results" VALUES(2,1,0.0,'{"mqar": 0.0}','{"layout": "2*window", "curves": {"mqar": [[0, 3.9781835079193115], [1, 4.174713611602783], [2, 3.8710711002349854], [3, 3.7992684841156006]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.017578125, "mqar_accuracy_4": 0.03515625}, "new_steps": 2}',4,256,3.61295810002957296092e-02,9.11290049998569884337e-02,0);
INSERT INTO "nas_results" VALUES(3,0,0.0,'{"mqar": 0.0}','{"layout": "2*kda", "curves": {"mqar": [[0, 4.005904197692871], [1, 3.7559549808502197]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.041015625, "mqar_accuracy_4": 0.0341796875}, "new_steps": 2}',2,128,2.71248999997624196112e-02,1.12053841000033571617e-01,0);
INSERT INTO "nas_results" VALUES(3,1,0.0,'{"mqar": 0.0}','{"layout": "2*kda", "curves": {"mqar": [[0, 4.005904197692871], [1, 3.7559549808502197], [2, 4.031640529632568], [3, 3.9499566555023193]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.044921875, "mqar_accuracy_4": 0.037109375}, "new_steps": 2}',4,256,5.70954089994302194099e-02,2.05291895999835105612e-01,0);
INSERT INTO "nas_results" VALUES(4,0,0.0,'{"mqar": 0.0}','{"layout": "kda window", "curves": {"mqar": [[0, 3.8706753253936768], [1, 3.432546377182007]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.05078125, "mqar_accuracy_4": 0.0419921875}, "new_steps": 2}',2,128,3.27200850001645449083e-02,1.20898854999722971115e-01,0);
INSERT INTO "nas_results" VALUES(4,1,0.0,'{"mqar": 0.0}','{"layout": "kda window", "curves": {"mqar": [[0, 3.8706753253936768], [1, 3.432546377182007], [2, 3.7768189907073975], [3, 3.723031759262085]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.046875, "mqar_accuracy_4": 0.0458984375}, "new_steps": 2}',4,256,5.56925840000985772348e-02,1.82263117999355017673e-01,0);
INSERT INTO "nas_results" VALUES(5,0,0.0,'{"mqar": 0.0}','{"layout": "kda full[kv_heads=1]", "curves": {"mqar": [[0, 3.632042646408081], [1, 3.697972297668457]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.029296875, "mqar_accuracy_4": 0.02734375}, "new_steps": 2}',2,128,2.86380780003128165844e-02,1.00077594000140379648e-01,0);
INSERT INTO "nas_results" VALUES(5,1,0.0,'{"mqar": 0.0}','{"layout": "kda full[kv_heads=1]", "curves": {"mqar": [[0, 3.632042646408081], [1, 3.697972297668457], [2, 3.8483827114105225], [3, 3.828925371170044]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.03125, "mqar_accuracy_4": 0.029296875}, "new_steps": 2}',4,256,5.29691660003663855604e-02,1.54609231999984331196e-01,0);
INSERT INTO "nas_results" VALUES(6,0,0.0,'{"mqar": 0.0}','{"layout": "window[kv_heads=1,size=8,soft_cap=50] full[kv_heads=1,soft_cap=50]", "curves": {"mqar": [[0, 3.9262466430664062], [1, 3.994133710861206]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.025390625, "mqar_accuracy_4": 0.0400390625}, "new_steps": 2}',2,128,1.54158390000702638644e-02,5.84140780001689563505e-02,0);
INSERT INTO "nas_results" VALUES(6,1,0.0,'{"mqar": 0.0}','{"layout": "window[kv_heads=1,size=8,soft_cap=50] full[kv_heads=1,soft_cap=50]", "curves": {"mqar": [[0, 3.9262466430664062], [1, 3.994133710861206], [2, 3.658372640609741], [3, 3.611323595046997]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.03125, "mqar_accuracy_4": 0.048828125}, "new_steps": 2}',4,256,3.17912239997895085252e-02,9.11328919996776676271e-02,0);
INSERT INTO "nas_results" VALUES(7,0,0.0,'{"mqar": 0.0}','{"layout": "full[kv_heads=1] window", "curves": {"mqar": [[0, 3.9526755809783936], [1, 3.7550642490386963]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.037109375}, "new_steps": 2}',2,128,1.64328699997895455453e-02,5.23243080001520866062e-02,0);
INSERT INTO "nas_results" VALUES(7,1,0.0,'{"mqar": 0.0}','{"layout": "full[kv_heads=1] window", "curves": {"mqar": [[0, 3.9526755809783936], [1, 3.7550642490386963], [2, 3.7974674701690674], [3, 3.716557741165161]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.044921875, "mqar_accuracy_4": 0.0419921875}, "new_steps": 2}',4,256,3.22535109994532831478e-02,8.51757570003428554628e-02,0);
INSERT INTO "nas_results" VALUES(8,0,0.0,'{"mqar": 0.0}','{"layout": "window full[kv_heads=1]", "curves": {"mqar": [[0, 3.780937433242798], [1, 3.809495210647583]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.04296875, "mqar_accuracy_4": 0.0400390625}, "new_steps": 2}',2,128,2.54958790001182933337e-02,0.07895596499975,0);
INSERT INTO "nas_results" VALUES(8,1,5.44819078947368119758e-03,'{"mqar": 0.005448190789473681}','{"layout": "window full[kv_heads=1]", "curves": {"mqar": [[0, 3.780937433242798], [1, 3.809495210647583], [2, 3.878586530685425], [3, 3.8854055404663086]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0625, "mqar_accuracy_4": 0.0478515625}, "new_steps": 2}',4,256,4.5649799999864626443e-02,1.13021909999588388018e-01,0);
INSERT INTO "nas_results" VALUES(9,0,0.0,'{"mqar": 0.0}','{"layout": "2*full", "curves": {"mqar": [[0, 4.0211710929870605], [1, 4.254825592041016], [2, 3.892972707748413], [3, 3.7685155868530273]]}, "learning_rates": {"mqar": 0.01}, "metrics": {"mqar_accuracy_2": 0.0390625, "mqar_accuracy_4": 0.04296875}, "new_steps": 2}',4,256,0.0227131440001358,8.27489319999585859477e-02,0);
CREATE TABLE nas_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "nas_schema" VALUES(4);
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
INSERT INTO "nas_studies" VALUES(1,'tiny','{"seed": 0, "sampler": "random", "objectives": ["quality", "latency_ms", "kv_bytes"], "data": "stdlib", "rungs": {"shares": [0.5], "keep": 0.2, "chance": 0.1, "trust": 0.1}, "target": {"width": 64, "depth": 4, "train_length": 64, "context": 64, "batch": 1, "dtype": "bfloat16", "vocabulary": 64, "rotary_base": 10000.0, "rotary_scaling": "none", "rotary_factor": 1.0, "rotary_length": null, "fill": "stack", "contexts": [32, 128], "device": "cpu"}, "proxy": {"width": 16, "length": 16, "stem_taps": 4, "weight_decay": 0.1, "precision": "auto", "device": "cpu"}, "space": {"layers": 2, "mixers": ["full", "window", "kda"], "settings": {"full": {"kv_heads": [1]}, "window": {"size": [8, 16]}, "kda": {"head_dim": [16]}}, "channels": ["swiglu"], "sharing": "layer", "constraints": []}, "tasks": {"mqar": {"weight": 1.0, "steps": 4, "batch": 4, "learning_rates": [0.01], "pairs": []}}, "data_sha256": null}','0b9a59f84fd80809','[{"name": "quality", "maximise": true, "low": 0.0, "high": 1.0, "log": false, "unit": ""}, {"name": "latency_ms", "maximise": false, "low": 1.6449104001367232, "high": 4.252782501339425, "log": true, "unit": "ms"}, {"name": "kv_bytes", "maximise": false, "low": 6553.6, "high": 81920.0, "log": true, "unit": "bytes"}]','{"full": "attention", "differential": "attention", "cross_layer": "attention", "window": "sparse", "strided": "sparse", "fixed": "sparse", "longformer": "sparse", "bigbird": "sparse", "moba": "sparse", "nsa": "sparse", "mosa": "sparse", "linformer": "sparse", "mla": "latent", "dsa": "latent", "transformer_xl": "memory", "compressive": "memory", "infini": "memory", "memory_tokens": "memory", "retrieval": "memory", "tree": "memory", "linear": "linear_attention", "performer": "linear_attention", "lolcats": "linear_attention", "retnet": "linear_attention", "lightning": "linear_attention", "gla": "linear_attention", "hgrn2": "linear_attention", "rwkv6": "linear_attention", "qla": "linear_attention", "loglinear": "linear_attention", "s4": "state_space", "s4d": "state_space", "mamba": "state_space", "mamba2": "state_space", "mamba3": "state_space", "gmu": "state_space", "deltanet": "delta", "gated_delta": "delta", "kda": "delta", "rwkv7": "delta", "mlstm": "recurrent", "rglru": "recurrent", "mingru": "recurrent", "sru": "recurrent", "lstm": "recurrent", "clockwork": "recurrent", "hyena": "convolution", "shortconv": "convolution"}',1.79534591044198560717e+09);
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
	driver_id INTEGER, 
	failures INTEGER DEFAULT '0' NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (study_id, number), 
	CONSTRAINT nas_trial_state CHECK (state IN ('waiting', 'running', 'done', 'pruned', 'unfit', 'lost', 'quarantined')), 
	FOREIGN KEY(study_id) REFERENCES nas_studies (id), 
	FOREIGN KEY(layout_key) REFERENCES nas_layouts ("key"), 
	CONSTRAINT nas_trial_driver FOREIGN KEY(driver_id) REFERENCES nas_drivers (id)
);
INSERT INTO "nas_trials" VALUES(1,1,0,'done','uniform','ddab2d4c83db92f3','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}','[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]','6d542ad1496d976b',2,'',1.79534591061201095583e+09,1.7953459107440159321e+09,1.79534591080400347711e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(2,1,1,'done','uniform','bf96093a67835145','{"0.mixer": "window", "0.window.size": 8, "1.mixer": "window", "1.window.size": 8}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 8192, "read_bytes": 8192, "flops_prefill": 396864.0, "flops_decode": 397312.0, "serial_steps": 0, "latency_ms": 2.5785220000216214, "kv_bytes@32": 8192, "kv_bytes@128": 8192, "tokens_per_s": 387.8190684398329, "latency_ms_whole": 4.3230445000972395}','[{"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 0.6446305000054053}, {"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 0.6446305000054053}]','2d6fa36044ad6c6e',2,'',1.79534591084198355678e+09,1.79534591097201704978e+09,1.7953459110390052795e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(3,1,2,'done','uniform','b338635f1b3eb27f','{"0.mixer": "kda", "0.kda.head_dim": 16, "1.mixer": "kda", "1.kda.head_dim": 16}','{}','{"params": 215888, "active_params": 215888.0, "kv_bytes": 20992, "read_bytes": 20992, "flops_prefill": 662186.6666666666, "flops_decode": 458752.0, "serial_steps": 0, "latency_ms": 2.056138000170904, "kv_bytes@32": 20992, "kv_bytes@128": 20992, "tokens_per_s": 486.3486788906586, "latency_ms_whole": 2.1527090000290627}','[{"params": 53972.0, "kv_bytes": 5248.0, "latency_ms": 0.514034500042726}, {"params": 53972.0, "kv_bytes": 5248.0, "latency_ms": 0.514034500042726}]','ed8365459d1d2573',2,'',1.79534591107400798805e+09,1.79534591124499893185e+09,1.7953459113689973354e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(4,1,3,'done','search','c96b891ea47c8043','{"0.mixer": "kda", "0.kda.head_dim": 16, "1.mixer": "window", "1.window.size": 8}','{}','{"params": 205480, "active_params": 205480.0, "kv_bytes": 14592, "read_bytes": 14592, "flops_prefill": 529525.3333333333, "flops_decode": 428032.0, "serial_steps": 0, "latency_ms": 2.3173300000962627, "kv_bytes@32": 14592, "kv_bytes@128": 14592, "tokens_per_s": 431.53111553316086, "latency_ms_whole": 3.182251499879385}','[{"params": 53972.0, "kv_bytes": 5248.0, "latency_ms": 0.514034500042726}, {"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 0.6446305000054053}]','3c22436f80403c47',2,'',1.79534591140798330307e+09,1.79534591159599280353e+09,1.79534591167999958987e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(5,1,4,'done','search','1a5b47fb451f4557','{"0.mixer": "kda", "0.kda.head_dim": 16, "1.mixer": "full", "1.full.kv_heads": 1}','{}','{"params": 193192, "active_params": 193192.0, "kv_bytes": 18688, "read_bytes": 18688, "flops_prefill": 517717.3333333333, "flops_decode": 432128.0, "serial_steps": 0, "latency_ms": 2.2222175000479183, "kv_bytes@32": 14592, "kv_bytes@128": 26880, "tokens_per_s": 450.0009562423285, "latency_ms_whole": 2.4746069998400344}','[{"params": 53972.0, "kv_bytes": 5248.0, "latency_ms": 0.514034500042726}, {"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 0.5970742499812332}]','21023d5d7493bd39',2,'',1.79534591171898555753e+09,1.79534591188599324225e+09,1795345911.98899,NULL,0);
INSERT INTO "nas_trials" VALUES(6,1,5,'done','gemma-2-9b','89a7df4f49f4fe70','{}','{}','{"params": 170496, "active_params": 170496.0, "kv_bytes": 12288, "read_bytes": 12288, "flops_prefill": 369024.0, "flops_decode": 389120.0, "serial_steps": 0, "latency_ms": 2.5301304997356056, "kv_bytes@32": 8192, "kv_bytes@128": 20480, "tokens_per_s": 395.23653033094473}','[{"params": 42624.0, "kv_bytes": 2048.0, "latency_ms": 0.6518487499533876}, {"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 0.6132164999144152}]','85f88f686254cd62',2,'',1.79534591202801609034e+09,1.79534591215901517865e+09,1.79534591223099231722e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(7,1,6,'done','search','53ad04828d55f8f2','{"0.mixer": "full", "0.full.kv_heads": 1, "1.mixer": "window", "1.window.size": 8}','{}','{"params": 182784, "active_params": 182784.0, "kv_bytes": 12288, "read_bytes": 12288, "flops_prefill": 385056.0, "flops_decode": 401408.0, "serial_steps": 0, "latency_ms": 2.483409499973277, "kv_bytes@32": 8192, "kv_bytes@128": 20480, "tokens_per_s": 402.6722133465144, "latency_ms_whole": 2.7536825001561738}','[{"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 0.5970742499812332}, {"params": 48768.0, "kv_bytes": 2048.0, "latency_ms": 0.6446305000054053}]','46d38cb1cafb5f87',2,'',1.79534591227400159834e+09,1.79534591239498257644e+09,1.79534591245698189735e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(8,1,7,'done','search','1426fa46244265f7','{"0.mixer": "window", "0.window.size": 16, "1.mixer": "full", "1.full.kv_heads": 1}','{}','{"params": 182784, "active_params": 182784.0, "kv_bytes": 16384, "read_bytes": 16384, "flops_prefill": 388416.0, "flops_decode": 405504.0, "serial_steps": 0, "latency_ms": 2.4635395004679594, "kv_bytes@32": 12288, "kv_bytes@128": 24576, "tokens_per_s": 405.9200186601619, "latency_ms_whole": 3.3945140003197594}','[{"params": 48768.0, "kv_bytes": 4096.0, "latency_ms": 0.6346955002527466}, {"params": 42624.0, "kv_bytes": 4096.0, "latency_ms": 0.5970742499812332}]','0169ec8ce7f95d12',2,'',1.7953459124970138073e+09,1.79534591264398550982e+09,1.79534591271000814431e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(9,1,8,'pruned','search','796cc253309f2d21','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}','[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]','made for window kda',1,'',1.79534595846598601345e+09,1.79534595848799347875e+09,1.79534595851301860807e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(10,1,9,'unfit','search','224fbaac75d47939','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}','[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]','made for window full',1,'the loss is NaN at step 2',1.79534595852999687192e+09,1.79534595854399800299e+09,1.7953459585520043373e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(11,1,10,'lost','search','63b14f28c110cd6e','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}','[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]','made for full kda',1,'the worker was killed',1.79534595857200026509e+09,1.79534595859099030496e+09,1.79534595861500954625e+09,NULL,0);
INSERT INTO "nas_trials" VALUES(12,1,11,'waiting','search','31bfe4afb51d41e4','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}','[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]','made for kda full',0,'',1.79534595862398147587e+09,NULL,NULL,NULL,0);
INSERT INTO "nas_trials" VALUES(13,1,12,'quarantined','search','f89881ee1c4ca557','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}','[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]','kept-5',3,'the worker died: WorkerCrashedError',1.79536255087801957129e+09,1.79536255089198064803e+09,1.79536255089399218558e+09,NULL,3);
INSERT INTO "nas_trials" VALUES(14,1,13,'waiting','search','ac52ed8a8b3c51ca','{}','{}','{"params": 195072, "active_params": 195072.0, "kv_bytes": 65536, "read_bytes": 65536, "flops_prefill": 422400.0, "flops_decode": 454656.0, "serial_steps": 0, "latency_ms": 2.7911180000046443, "kv_bytes@32": 32768, "kv_bytes@128": 131072, "tokens_per_s": 358.2793704882187}','[{"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}, {"params": 48768.0, "kv_bytes": 16384.0, "latency_ms": 0.6977795000011611}]','kept-6',1,'',1.79536255089700961108e+09,NULL,NULL,NULL,0);
CREATE INDEX nas_drivers_by_study ON nas_drivers (study_id, ended_at);
CREATE INDEX nas_events_by_study ON nas_events (study_id, seq);
CREATE INDEX nas_trials_by_state ON nas_trials (study_id, state, number);
CREATE INDEX ix_nas_trials_evaluation_key ON nas_trials (evaluation_key);
CREATE INDEX nas_trials_by_layout ON nas_trials (study_id, layout_key);
CREATE INDEX ix_nas_repeats_evaluation_key ON nas_repeats (evaluation_key);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('nas_events',64);
COMMIT;
