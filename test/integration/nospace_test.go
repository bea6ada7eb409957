package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// smallStore puts a tmpfs of the given size over the store for one test.
func smallStore(t *testing.T, size string) {
	t.Helper()
	if err := unix.Mount("tmpfs", storeRoot, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(storeRoot, unix.MNT_DETACH) })
}

const trapping = `trap 'exit 7' TERM; n=0; while :; do n=$((n+1)); echo "count $n $(hostname)"; sleep 0.05; done`

// TestNoSpace runs out of space before, in the middle of and after the dump:
// the container gets its signal each time and nothing is left in the store.
func TestNoSpace(t *testing.T) {
	check := func(t *testing.T, n *node, key string, c *ctr) {
		t.Helper()
		if st := c.status(); st.ExitCode != 7 {
			t.Errorf("exit code %d, want the program's own 7", st.ExitCode)
		}
		e := wantEvent(t, key, event.DumpFailed, "no-space")
		t.Logf("reason: %s", e.Reason)
		if rs := records(t, key); len(rs) != 0 {
			t.Errorf("records: %v", rs)
		}
		if m, _ := filepath.Glob(filepath.Join(storeRoot, ".stage-*")); len(m) != 0 {
			t.Errorf("stages left: %v", m)
		}
		assertNothingFrozen(t)
	}
	t.Run("before", func(t *testing.T) {
		n, key := newNode(t), uniqueKey(t)
		smallStore(t, "32m")
		p := n.runPod(key, annotate(key))
		c := p.start("c", "busybox", shell(trapping))
		c.waitCount(3)
		c.stop(30)
		check(t, n, key, c)
		p.remove()
	})
	// The writable layer is not part of the estimate, so the copy of it hits
	// the end of the disk at different places.
	for _, mb := range []int{70, 100, 130} {
		t.Run(fmt.Sprintf("layer of %d MB", mb), func(t *testing.T) {
			n, key := newNode(t), uniqueKey(t)
			smallStore(t, "69m")
			p := n.runPod(key, annotate(key))
			c := p.start("c", "busybox", shell(trapping))
			c.mustExec("/bin/sh", "-c", fmt.Sprintf("dd if=/dev/urandom of=/big bs=1M count=%d 2>/dev/null", mb))
			before := c.waitCount(3)
			c.stop(30)
			check(t, n, key, c)
			if ns, _ := counts(c.log()); ns[len(ns)-1] < before {
				t.Errorf("it did not run on after the failed dump")
			}
			p.remove()
		})
	}
	t.Run("while CRIU writes", func(t *testing.T) {
		n, key := newNode(t), uniqueKey(t)
		smallStore(t, "700m")
		p := n.runPod(key, annotate(key))
		c := p.start("c", "python", []string{"python3", "-c", bigHeap})
		c.waitLog("ready")
		done := make(chan error, 1)
		go func() {
			_, err := n.rt.StopContainer(n.ctx(), stopRequest(c.id, 60))
			done <- err
		}()
		eventually(t, "pages of the dump", func() error {
			m, _ := filepath.Glob(filepath.Join(storeRoot, ".stage-*/checkpoint/*.img"))
			if len(m) == 0 {
				return fmt.Errorf("none")
			}
			return nil
		})
		ballast, err := os.Create(filepath.Join(storeRoot, "ballast"))
		if err != nil {
			t.Fatal(err)
		}
		defer ballast.Close()
		chunk := make([]byte, 1<<20)
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
			if _, err := ballast.Write(chunk); err != nil {
				break // full
			}
		}
		if err := <-done; err != nil {
			t.Fatalf("stop: %v", err)
		}
		os.Remove(ballast.Name())
		if st := c.status(); st.ExitCode != 7 {
			t.Errorf("exit code %d, want the program's own 7", st.ExitCode)
		}
		// The event itself may not have found room.
		if rs := records(t, key); len(rs) != 0 {
			t.Errorf("records: %v", rs)
		}
		if m, _ := filepath.Glob(filepath.Join(storeRoot, ".stage-*")); len(m) != 0 {
			t.Errorf("stages left: %v", m)
		}
		assertNothingFrozen(t)
		p.remove()
	})
}

// assertNothingFrozen looks at every cgroup of the node.
func assertNothingFrozen(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{"freezer.state", "cgroup.freeze"} {
		filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || d.Name() != pattern {
				return nil
			}
			b, _ := os.ReadFile(path)
			if s := strings.TrimSpace(string(b)); s == "FROZEN" || s == "FREEZING" || s == "1" {
				t.Errorf("%s is %s", path, s)
			}
			return nil
		})
	}
}
