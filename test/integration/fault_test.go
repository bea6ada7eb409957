package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// faults is how often each of the three processes is killed; the sum is at
// least one hundred.
const faults = 34

func daemonPID(t *testing.T, name string) int {
	t.Helper()
	b, err := os.ReadFile("/run/" + name + ".pid")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// restart kills a daemon and starts it again.
func restart(t *testing.T, name string) {
	t.Helper()
	pid := daemonPID(t, name)
	fd, err := unix.PidfdOpen(pid, 0)
	if err == nil {
		defer unix.Close(fd)
		syscall.Kill(pid, syscall.SIGKILL)
		// Its locks are free when it has ended.
		n, err := 0, error(unix.EINTR)
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000)
		}
		if n != 1 {
			t.Errorf("%s does not end: %v", name, err)
		}
	}
	if out, err := exec.Command("/src/test/node/up", name).CombinedOutput(); err != nil {
		t.Errorf("restart %s: %v\n%s", name, err, out)
	}
}

// shimPIDs finds the shims of a sandbox.
func shimPIDs(sandbox string) (pids []int) {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && strings.Contains(string(b), "containerd-shim-stasis-v2") && strings.Contains(string(b), sandbox) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// copies counts the containers whose first process has the marker in its
// command line; a child that the shell has just forked looks the same, but has
// such a parent.
func copies(marker string) (n int) {
	marked := map[string]bool{}
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && strings.HasPrefix(string(b), "/bin/sh\x00") && strings.Contains(string(b), marker) {
			marked[filepath.Base(filepath.Dir(name))] = true
		}
	}
	for pid := range marked {
		b, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil {
			continue
		}
		// pid (comm) state ppid ...
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) > 1 && !marked[f[1]] {
			n++
		}
	}
	return n
}

// noTmpfsLeft fails unless what is mounted for a restore goes away.
func noTmpfsLeft(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(mounts), "stasis-tmpfs") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left on the node:\n%s", mounts)
		}
	}
}

// TestKill9 kills the shim, the daemon and containerd at random moments of a
// stop and of a create. Afterwards the container runs on as before, or its
// successor goes on from the record, or it starts cold; none is stuck, frozen
// or there twice, and a record is never used twice.
func TestKill9(t *testing.T) {
	for _, victim := range []string{"shim", "stasisd", "containerd"} {
		t.Run(victim, func(t *testing.T) {
			n := newNode(t)
			outcome := map[string]int{}
			for i := range faults {
				if t.Failed() {
					break
				}
				oneFault(t, n, victim, i, outcome)
			}
			t.Logf("%d faults: %v", faults, outcome)
			if outcome["restored"] == 0 {
				t.Error("not one container was restored")
			}
			noTmpfsLeft(t)
			assertNothingFrozen(t)
		})
	}
}

// removeEventually removes a pod whose runtime may be recovering.
func (p *pod) removeEventually() {
	p.n.t.Helper()
	eventually(p.n.t, "removal of pod "+p.config.Metadata.Name, p.tryRemove)
	p.id = ""
}

func oneFault(t *testing.T, n *node, victim string, i int, outcome map[string]int) {
	key := uniqueKey(t)
	marker := "marker-" + key
	command := shell(": " + marker + "; " + counting)
	duringDump := i%2 == 0
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", command)
	high := c.waitCount(5)

	strike := func(sandbox string) {
		time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
		switch victim {
		case "shim":
			for _, pid := range shimPIDs(sandbox) {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		default:
			restart(t, victim)
		}
	}

	var wg sync.WaitGroup
	if duringDump {
		wg.Go(func() { strike(p.id) })
		n.rt.StopContainer(n.ctx(), stopRequest(c.id, 20)) // may fail: its server may be dead
		wg.Wait()
	} else {
		c.stop(20)
	}
	eventually(t, "stop after the fault", func() error {
		if _, err := n.rt.StopContainer(n.ctx(), stopRequest(c.id, 20)); err != nil {
			return err
		}
		if st := c.status(); st.State == cri.ContainerState_CONTAINER_RUNNING {
			return fmt.Errorf("still running")
		}
		return nil
	})
	if ns, _ := counts(c.log()); len(ns) > 0 {
		high = ns[len(ns)-1]
	}
	p.removeEventually()
	eventually(t, "end of the old processes", func() error {
		if m := copies(marker); m != 0 {
			return fmt.Errorf("%d are left", m)
		}
		return nil
	})
	dumped := len(records(t, key)) > 0

	p = n.runPod(key, annotate(key))
	if !duringDump {
		wg.Go(func() { strike(p.id) })
	}
	c, err := p.tryCreate("c", "busybox", command)
	if err == nil {
		err = c.tryStart()
	}
	wg.Wait()
	if err != nil {
		// The fault hit the start; the kubelet would try again, in a new sandbox
		// where the old one's shim is dead.
		p.removeEventually()
		p = n.runPod(key, annotate(key))
		c = p.start("c", "busybox", command)
	}
	if victim == "shim" && len(shimPIDs(p.id)) == 0 {
		// Started, then killed with its shim: that is what a dead shim means.
		eventually(t, "end of the container without a shim", func() error {
			if st := c.status(); st.State == cri.ContainerState_CONTAINER_RUNNING {
				return fmt.Errorf("state %v", st.State)
			}
			return nil
		})
		p.removeEventually()
		outcome["died with its shim"]++
		return
	}
	c.waitCount(0)
	if m := copies(marker); m != 1 {
		t.Errorf("%d copies of the container run", m)
	}
	ns, _ := counts(c.log())
	switch {
	case ns[0] > 1:
		// What a container prints while containerd is down reaches no log, so
		// that the log may end before the state does. It never ends after it.
		unlogged := 0
		if victim == "containerd" {
			unlogged = 200
		}
		if ns[0] > high+1+unlogged || victim == "containerd" && ns[0] <= high {
			t.Errorf("restored at %d, the old container's log ended at %d", ns[0], high)
		}
		outcome["restored"]++
	case dumped:
		// A record was there and a cold start followed: somebody must say why,
		// unless the daemon or its connection was just what had been killed.
		es := events(t, key)
		told := func(e event.Event) bool {
			return e.Type == event.ColdStart || e.Type == event.Quarantined || e.Type == event.Restored
		}
		switch {
		case slices.ContainsFunc(es, told):
			outcome["cold, told"]++
		case victim == "shim":
			t.Errorf("cold in spite of a record, without a reason: %+v", es)
		default:
			outcome["cold, daemon away"]++
			// Once it is back it sets the record aside, and says so first.
			if len(records(t, key)) == 0 && !slices.ContainsFunc(events(t, key), told) {
				t.Error("nobody used the record, and yet it is gone")
			}
		}
	default:
		outcome["cold"]++
	}
	c.stop(20)
	p.removeEventually()
}
