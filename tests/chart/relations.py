"""Values that each are fine and together are not: the chart refuses them and says what to do."""

from common import CHART, ROOT, check, template, values_file

SECRET = "scopeSecret.value=" + "ab" * 32
MODEL = "models.primary."
FILES = MODEL + "files[0].name=config.json," + MODEL + "files[0].digest=sha256:" + "0" * 64

# Values beside the defaults, what the refusal must say, and a change of one value that makes them fine.
RELATIONS = [
    # How a pod goes away.
    ("gateway.terminationGracePeriodSeconds=324", ["gateway: terminationGracePeriodSeconds (324)", "325"],
     "gateway.terminationGracePeriodSeconds=325"),
    ("auxScorer.preStopSeconds=21", ["auxScorer: terminationGracePeriodSeconds (60)"],
     "auxScorer.preStopSeconds=20"),
    ("gpuWorker.config.service.drain_seconds=311", ["gpuWorker: terminationGracePeriodSeconds (330)"],
     "gpuWorker.config.service.drain_seconds=310"),
    ("cacheStore.config.service.drain_seconds=59", ["cacheStore.config.service: drain_seconds (59)", "cut requests"],
     "cacheStore.config.service.drain_seconds=60"),
    ("gateway.config.service.request_timeout_seconds=306", ["gateway.config.service: drain_seconds (305)"],
     "gateway.config.service.request_timeout_seconds=305"),
    # Budgets.
    ("cacheStore.config.disk_bytes=19457Mi", ["disk_bytes (19457Mi)", "persistence.size (20Gi)"],
     "cacheStore.config.disk_bytes=19456Mi"),
    ("cacheStore.config.max_object_bytes=17Gi", ["max_object_bytes (17Gi)"],
     "cacheStore.config.max_object_bytes=16Gi"),
    ("gpuWorker.config.ram_bytes=3584Mi", ["gpuWorker: ram_bytes and page_bytes", "is 4Gi"],
     "gpuWorker.config.ram_bytes=3583Mi"),
    ("cacheStore.config.ram_bytes=3Gi", ["cacheStore: ram_bytes take 3221225472"],
     "cacheStore.config.ram_bytes=3071Mi"),
    ("gateway.config.token_cache_bytes=1Gi", ["gateway: token_cache_bytes"],
     "gateway.config.token_cache_bytes=1023Mi"),
    ("auxScorer.config.cache_bytes=2147483648", ["auxScorer: cache_bytes"],
     "auxScorer.config.cache_bytes=2147483647"),
    ("gateway.autoscaling.enabled=true,gateway.autoscaling.minReplicas=7",
     ["minReplicas (7) is above maxReplicas (6)"], "gateway.autoscaling.minReplicas=6"),
    # The index is in one place.
    ("externalRedis.urls={redis://r:6379}", ["redis.enabled and externalRedis.urls"], "redis.enabled=false"),
    ("redis.enabled=false,externalRedis.urls={redis://r:6379,redis://s:6379}", ["seeds of a cluster"],
     "externalRedis.cluster=true"),
    ("redis.enabled=false,externalRedis.urls={redis://r:6379},externalRedis.caSecret=ca", ["are not TLS"],
     "externalRedis.urls={rediss://r:6379}"),
    ("redis.enabled=false,externalRedis.cluster=true,externalRedis.urls={redis://r:6379,rediss://s:6379}",
     ["mix redis:// and rediss://"], "externalRedis.urls={rediss://r:6379,rediss://s:6379}"),
    ("redis.enabled=false,externalRedis.urls={redis://r:6379},externalRedis.username=me", ["an account has a password"],
     "externalRedis.existingSecret=mine"),
    ("cacheStore.config.index.timeout_seconds=11", ["timeout_seconds (11) is above lease_seconds (10)"],
     "cacheStore.config.index.timeout_seconds=10"),
    # Secrets and models.
    (SECRET + ",scopeSecret.existingSecret=mine", ["value and existingSecret"], "scopeSecret.value="),
    (MODEL + "source=existingClaim", ["set existingClaim.name"], MODEL + "existingClaim.name=models"),
    (MODEL + "source=image," + FILES, ["set image.reference"], MODEL + "image.reference=models:1"),
    (MODEL + "source=url," + FILES, ["set url.base"], MODEL + "url.base=https://models.example.com/1"),
    (MODEL + "source=url," + MODEL + "url.base=https://models.example.com/1", ["list the files with their digests"],
     FILES),
]  # fmt: skip


@check
def values_that_contradict_each_other_are_refused_with_what_to_do():
    for wrong, says, mended in RELATIONS:
        refusal = template("--set", wrong)
        assert refusal.returncode != 0, f"{wrong} was taken"
        for text in says:
            assert text in refusal.stderr, f"{wrong}: no {text!r} in {refusal.stderr}"
        # The control: one value differs, so the refusal was about that value and nothing else.
        taken = template("--set", f"{wrong},{mended}")
        assert taken.returncode == 0, f"{wrong},{mended}: {taken.stderr}"


@check
def the_development_secret_is_refused():
    source = (ROOT / "services/gateway/src/options.rs").read_text()
    line = next(line for line in source.splitlines() if "const DEVELOPMENT_SECRET" in line)
    secret = line.split('"')[1]
    for spelled in [secret, secret.upper()]:
        refusal = template("--set-string", f"scopeSecret.value={spelled}")
        assert refusal.returncode != 0 and "openssl rand -hex 32" in refusal.stderr, refusal.stderr
    other = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    assert template("--set-string", f"scopeSecret.value={other}").returncode == 0


@check
def a_scope_secret_of_another_form_is_refused_and_not_repeated_in_a_template():
    for wrong in ["hunter2", "ab" * 31, "zz" * 32]:
        refusal = template("--set-string", f"scopeSecret.value={wrong}")
        assert refusal.returncode != 0 and "scopeSecret" in refusal.stderr, refusal.stderr


@check
def credentials_in_a_redis_url_are_refused():
    url = "rediss://user:secret@redis.example.com:6380"
    refusal = template("--values", values_file("external-redis"), "--set", f"externalRedis.urls={{{url}}}")
    assert refusal.returncode != 0 and "externalRedis.urls" in refusal.stderr, refusal.stderr


@check
def a_size_that_is_none_is_refused():
    for wrong in ["16Gb", "lots", "1e9", "16 Gi"]:
        refusal = template("--set-string", f"cacheStore.config.disk_bytes={wrong}")
        assert refusal.returncode != 0 and "disk_bytes" in refusal.stderr, f"{wrong}: {refusal.stderr}"


@check
def the_values_explain_how_a_pod_goes_away():
    text = (CHART / "values.yaml").read_text()
    for relation in ["drain_seconds                  >= request_timeout_seconds",
                     "terminationGracePeriodSeconds  >= preStopSeconds + drain_seconds + 5"]:  # fmt: skip
        assert relation in text, relation
