# Sourced by the scripts that run tests: the user's own settings are not under test.
for name in CACHE_DIR CACHE_SIZE_LIMIT CACHE_KEY_FILE JIT BUILD ENGINE APPROX; do
    unset "SOFTCAP_$name"
done
