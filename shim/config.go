package shim

import "time"

// Config is what an operator could change about the shim. containerd starts a
// shim without arguments of ours, so these are constants of a build; tests set
// their own.
type Config struct {
	Root       string // of the store
	RuntimeDir string // host facts of the daemon, dump slots
	DumpSlots  int    // dumps of the whole node at a time
	// DumpTimeout bounds a dump where the caller has no deadline.
	DumpTimeout time.Duration
	// CallerMargin is kept of the caller's deadline for the rollback.
	CallerMargin time.Duration
	// MinFreeBytes must remain free in the store after a dump.
	MinFreeBytes int64
	// MinUptime: a container that was restored and stopped again earlier than
	// this, and is restarted in the same sandbox, is taken for crash-looping.
	MinUptime time.Duration
	// FactsTimeout is how long a restore waits for the daemon's host facts.
	FactsTimeout time.Duration
	// HookTimeout bounds the hook after a restore, during which the container
	// does not count as started.
	HookTimeout time.Duration
	// CleanupTimeout bounds every rollback: thaw, signal, removal of a stage.
	CleanupTimeout time.Duration
	// DeleteTimeout bounds the removal of a container, which does not end with its caller.
	DeleteTimeout time.Duration
}

// DefaultConfig is the configuration of the released shim.
func DefaultConfig() Config {
	return Config{
		Root:           "/var/lib/stasis",
		RuntimeDir:     "/run/stasis",
		DumpSlots:      2,
		DumpTimeout:    10 * time.Minute,
		CallerMargin:   5 * time.Second,
		MinFreeBytes:   64 << 20,
		MinUptime:      10 * time.Second,
		FactsTimeout:   20 * time.Second,
		HookTimeout:    10 * time.Second,
		CleanupTimeout: 30 * time.Second,
		DeleteTimeout:  2 * time.Minute,
	}
}
