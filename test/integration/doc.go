// Package integration holds the tests that run inside a test node, against a
// real containerd with the stasis shim and the daemon. `make test-node` builds
// its test binary and runs it there; elsewhere the tests skip, or fail where
// STASIS_REQUIRE names "node".
package integration
