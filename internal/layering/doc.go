// Package layering holds no code, but the test that keeps the packages of this
// module in their layers:
//
//	cmd -> shim, nri -> pkg/restore -> pkg/checkpoint and what is below it
//
// The golangci-lint configuration has the same rules for editors; this test is
// what counts. The go command cannot see what the test reads, so a cached "ok"
// says nothing: run it with -count=1.
package layering
