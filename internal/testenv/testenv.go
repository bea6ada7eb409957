// Package testenv says what a test needs of the machine it runs on.
//
// A test that cannot run is skipped where somebody works on a laptop, but fails
// where the environment variable STASIS_REQUIRE, a comma-separated list of
// features, names what is missing: a check that demands everything cannot pass
// by skipping.
package testenv

import (
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Feature is something that not every machine has.
type Feature string

const (
	// Root: user 0, able to mount, chown, make devices and set trusted.* attributes.
	Root Feature = "root"
	// CRIU: the command criu, and root to run it.
	CRIU Feature = "criu"
	// Runc: the command runc, and root to run it.
	Runc Feature = "runc"
	// Node: the test runs inside the test node (STASIS_NODE=1).
	Node Feature = "node"
)

// Need skips the test if a feature is missing, or fails it if STASIS_REQUIRE
// names the feature.
func Need(t testing.TB, what ...Feature) {
	t.Helper()
	for _, f := range what {
		reason := missing(f)
		if reason == "" {
			continue
		}
		if required(f) {
			t.Fatalf("STASIS_REQUIRE names %s, but %s", f, reason)
		}
		t.Skipf("needs %s: %s", f, reason)
	}
}

func required(f Feature) bool {
	return slices.ContainsFunc(strings.Split(os.Getenv("STASIS_REQUIRE"), ","), func(s string) bool {
		return strings.TrimSpace(s) == string(f)
	})
}

// missing is the reason why a feature is not there, or empty.
func missing(f Feature) string {
	switch f {
	case Root:
		if os.Geteuid() != 0 {
			return "this is not root"
		}
	case CRIU, Runc:
		if _, err := exec.LookPath(string(f)); err != nil {
			return err.Error()
		}
		return missing(Root)
	case Node:
		if os.Getenv("STASIS_NODE") != "1" {
			return "this is not the test node (STASIS_NODE=1)"
		}
	default:
		return "nobody knows this feature"
	}
	return ""
}

// PrivateMounts gives the rest of the test a mount namespace of its own; it
// needs [Root]. The namespace belongs to the test's goroutine: what other
// goroutines, subtests among them, do is outside of it, and it ends with the
// test, mounts included.
func PrivateMounts(t testing.TB) {
	t.Helper()
	Need(t, Root)
	// Never unlocked: the thread ends with the goroutine.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatalf("unshare: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatalf("make mounts private: %v", err)
	}
}

// Mount mounts a file system until the end of the test, within [PrivateMounts].
func Mount(t testing.TB, fstype, dir, options string) {
	t.Helper()
	if err := unix.Mount(fstype, dir, fstype, 0, options); err != nil {
		t.Fatalf("mount %s on %s (%s): %v", fstype, dir, options, err)
	}
	t.Cleanup(func() {
		// Detached: the test's directory can be removed whoever still looks into it.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}
