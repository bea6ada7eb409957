package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// shim connects to the control service of the container's shim.
func (c *ctr) shim() control.Client {
	c.p.n.t.Helper()
	b, err := os.ReadFile(filepath.Join("/run/containerd/io.containerd.runtime.v2.task/k8s.io", c.id, "bootstrap.json"))
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	var bootstrap struct{ Address string }
	if err := json.Unmarshal(b, &bootstrap); err != nil {
		c.p.n.t.Fatal(err)
	}
	conn, err := net.Dial("unix", strings.TrimPrefix(bootstrap.Address, "unix://"))
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	c.p.n.t.Cleanup(func() { client.Close() })
	return control.NewClient(client)
}

func (c *ctr) prepare() control.Result {
	c.p.n.t.Helper()
	r, err := c.shim().Prepare(c.p.n.ctx(), c.id)
	if err != nil {
		c.p.n.t.Fatalf("prepare %s: %v", c.config.Metadata.Name, err)
	}
	return r
}

func (c *ctr) abort() {
	c.p.n.t.Helper()
	if err := c.shim().Abort(c.p.n.ctx(), c.id); err != nil {
		c.p.n.t.Fatalf("abort %s: %v", c.config.Metadata.Name, err)
	}
}

func (c *ctr) wantState(want control.State) control.Status {
	c.p.n.t.Helper()
	st, err := c.shim().Status(c.p.n.ctx(), c.id)
	if err != nil || st.State != want {
		c.p.n.t.Errorf("status of %s: %+v, %v, want %s", c.config.Metadata.Name, st, err, want)
	}
	return st
}

// lastCount is the newest count in the log of a container that does not run.
func (c *ctr) lastCount() int {
	c.p.n.t.Helper()
	time.Sleep(time.Duration(slow) * 100 * time.Millisecond) // what was in the pipe
	ns, _ := counts(c.log())
	if len(ns) == 0 {
		c.p.n.t.Fatal("an empty log")
	}
	return ns[len(ns)-1]
}

// wantStill fails if the counter advances, and returns where it stands.
func (c *ctr) wantStill() int {
	c.p.n.t.Helper()
	before := c.lastCount()
	time.Sleep(time.Second)
	if after := c.lastCount(); after != before {
		c.p.n.t.Errorf("a frozen container counted from %d to %d", before, after)
	}
	return before
}

// wantFirst fails unless the log of a new container begins with the count.
func (c *ctr) wantFirst(want int) {
	c.p.n.t.Helper()
	c.waitCount(want + 2)
	if ns, _ := counts(c.log()); ns[0] != want {
		c.p.n.t.Errorf("the new log begins with count %d, want %d", ns[0], want)
	}
}

// wantKilled waits for the end of the container, with one of the exit codes.
func (c *ctr) wantKilled(codes ...int32) {
	c.p.n.t.Helper()
	eventually(c.p.n.t, "end of "+c.config.Metadata.Name, func() error {
		if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED || !slices.Contains(append(codes, 137), st.ExitCode) {
			return fmt.Errorf("state %v, exit code %d, want exited with 137 or %v", st.State, st.ExitCode, codes)
		}
		return nil
	})
}

func wantRecords(t *testing.T, key string, want int) {
	t.Helper()
	if rs := records(t, key); len(rs) != want {
		t.Errorf("%d records, want %d; events: %+v", len(rs), want, events(t, key))
	}
	if m, _ := filepath.Glob(filepath.Join(storeRoot, ".stage-*")); len(m) != 0 {
		t.Errorf("stages left: %v", m)
	}
}

func policies(t *testing.T, test func(t *testing.T, n *node, key string, annotations map[string]string)) {
	for _, policy := range []string{"reboot", "resume"} {
		t.Run(policy, func(t *testing.T) {
			key := uniqueKey(t)
			test(t, newNode(t), key, annotate(key, checkpoint.AnnotationPolicy, policy))
		})
	}
}

// TestPrepareAbort: a prepared container stands still and answers; called off
// it goes on, without its record, and is as it was.
func TestPrepareAbort(t *testing.T) {
	policies(t, func(t *testing.T, n *node, key string, annotations map[string]string) {
		p := n.runPod(key, annotations)
		c := p.start("c", "busybox", shell(trapping))
		c.waitCount(5)
		if st := c.wantState(control.Running); st.PID == 0 || st.MemoryBytes == 0 || st.Identity.Key != key {
			t.Errorf("status %+v", st)
		}
		r := c.prepare()
		if r.SizeBytes == 0 || r.Duration <= 0 || r.Timings.CRIUMicros == 0 || r.Already {
			t.Errorf("result %+v", r)
		}
		at := c.wantStill()
		if st := c.wantState(control.Prepared); st.CheckpointID != r.CheckpointID {
			t.Errorf("status %+v", st)
		}
		if st := c.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("state %v", st.State)
		}
		if _, err := n.rt.ContainerStats(n.ctx(), statsRequest(c.id)); err != nil {
			t.Errorf("stats: %v", err)
		}
		if _, err := c.exec("true"); err == nil || !strings.Contains(err.Error(), "prepare-reboot --abort") {
			t.Errorf("exec: %v, want a refusal that tells the way out", err)
		}
		if _, err := n.rt.CheckpointContainer(n.ctx(), &cri.CheckpointContainerRequest{
			ContainerId: c.id, Location: filepath.Join(t.TempDir(), "c.tar"), Timeout: 10 * slow,
		}); err == nil {
			t.Error("the CRI call checkpointed a container that is prepared")
		}
		if again := c.prepare(); !again.Already || again.CheckpointID != r.CheckpointID {
			t.Errorf("prepared again: %+v", again)
		}
		wantRecords(t, key, 1)
		if e := wantEvent(t, key, event.Dumped, ""); e.CheckpointID != r.CheckpointID || e.Reason != "node reboot" {
			t.Errorf("event %+v", e)
		}
		c.abort()
		c.waitCount(at + 3)
		if ns, _ := counts(c.log()); !slices.Contains(ns, at+1) {
			t.Errorf("it did not go on from %d", at)
		}
		wantRecords(t, key, 0)
		assertNothingFrozen(t)
		c.mustExec("true")
		c.wantState(control.Running)
		c.abort() // nothing to do is no error

		c.stop(30)
		if annotations[checkpoint.AnnotationPolicy] == "reboot" {
			wantRecords(t, key, 0)
			if st := c.status(); st.ExitCode != 7 {
				t.Errorf("exit code %d, want the program's own 7", st.ExitCode)
			}
			return
		}
		wantRecords(t, key, 1)
		c.wantKilled()
	})
}

// TestPrepareStop: a prepared container that is stopped is killed where it was
// frozen, and its successor goes on from there, once.
func TestPrepareStop(t *testing.T) {
	policies(t, func(t *testing.T, n *node, key string, annotations map[string]string) {
		at := 0
		for range 2 { // the second one was restored itself
			p := n.runPod(key, annotations)
			c := p.start("c", "busybox", shell(counting))
			c.wantFirst(at + 1)
			wantRecords(t, key, 0)
			c.prepare()
			at = c.wantStill()
			c.stop(30)
			c.wantKilled()
			if after := c.lastCount(); after != at {
				t.Errorf("it was frozen at %d and counted on to %d", at, after)
			}
			wantRecords(t, key, 1)
			p.remove()
		}
		p := n.runPod(key, annotations)
		c := p.start("c", "busybox", shell(counting))
		c.wantFirst(at + 1)
		wantRecords(t, key, 0)
		assertNothingFrozen(t)
		if annotations[checkpoint.AnnotationPolicy] == "resume" {
			return
		}
		c.stop(0) // without having been prepared it is not dumped
		p.remove()
		p = n.runPod(key, annotations)
		p.start("c", "busybox", shell(counting)).wantFirst(1)
	})
}

// TestPrepareShimDies: whatever ends the shim of a prepared container ends the
// container where it was frozen.
func TestPrepareShimDies(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			n, key := newNode(t), uniqueKey(t)
			marker := "marker-" + key
			annotations := annotate(key, checkpoint.AnnotationPolicy, "reboot")
			p := n.runPod(key, annotations)
			c := p.start("c", "busybox", shell(": "+marker+"; "+counting))
			c.waitCount(3)
			c.prepare()
			at := c.wantStill()
			for _, pid := range shimPIDs(p.id) {
				if err := syscall.Kill(pid, sig); err != nil {
					t.Error(err)
				}
			}
			c.wantKilled(255) // containerd's own, where the shim cannot tell
			eventually(t, "end of the processes", func() error {
				if m := copies(marker); m != 0 {
					return fmt.Errorf("%d are left", m)
				}
				return nil
			})
			wantRecords(t, key, 1)
			p.removeEventually()
			assertNothingFrozen(t)
			p = n.runPod(key, annotations)
			p.start("c", "busybox", shell(": "+marker+"; "+counting)).wantFirst(at + 1)
		})
	}
}

// TestPrepareKill9 kills the shim at random moments while a container is being
// prepared or called off. The container is dead afterwards, and its successor
// goes on from where it stood or starts cold without a record: a record never
// outlives the going on of its container.
func TestPrepareKill9(t *testing.T) {
	n := newNode(t)
	outcome := map[string]int{}
	for i := range 16 {
		if t.Failed() {
			break
		}
		key := uniqueKey(t)
		marker := "marker-" + key
		annotations := annotate(key, checkpoint.AnnotationPolicy, "reboot")
		p := n.runPod(key, annotations)
		c := p.start("c", "busybox", shell(": "+marker+"; "+counting))
		c.waitCount(3)
		shim, ctx := c.shim(), n.ctx()
		var wg sync.WaitGroup
		if i%2 == 1 {
			c.prepare()
			time.Sleep(100 * time.Millisecond)
		}
		wg.Go(func() {
			if i%2 == 0 {
				shim.Prepare(ctx, c.id) // may fail, as its server may die
			} else {
				shim.Abort(ctx, c.id)
			}
		})
		within := 1500 / (1 + 4*(i%2)) // an abort is quicker
		time.Sleep(time.Duration(rand.IntN(within)*int(slow)) * time.Millisecond)
		for _, pid := range shimPIDs(p.id) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		wg.Wait()
		c.wantKilled(255)
		eventually(t, "end of the processes", func() error {
			if m := copies(marker); m != 0 {
				return fmt.Errorf("%d are left", m)
			}
			return nil
		})
		high := c.lastCount()
		p.removeEventually()
		there := len(records(t, key))
		p = n.runPod(key, annotations)
		c = p.start("c", "busybox", shell(": "+marker+"; "+counting))
		c.waitCount(0)
		ns, _ := counts(c.log())
		switch {
		case there == 0 && ns[0] == 1:
			outcome["cold"]++
		case there == 1 && ns[0] > high && ns[0] <= high+3: // a line or two may have died with the shim
			outcome["restored"]++
		default:
			t.Errorf("%d records; the log ended at %d, the next begins with %d; events: %+v", there, high, ns[0], events(t, key))
		}
		if rs := records(t, key); len(rs) != 0 {
			t.Errorf("it runs, and there is %v", rs)
		}
		c.stop(0)
		p.remove()
	}
	t.Logf("%v", outcome)
	if outcome["cold"] == 0 || outcome["restored"] == 0 {
		t.Error("the faults hit only one side")
	}
	assertNothingFrozen(t)
	// What the shims left in the middle of a dump the daemon sweeps.
	restart(t, "stasisd")
	eventually(t, "sweep", func() error {
		if m, _ := filepath.Glob(filepath.Join(storeRoot, ".stage-*")); len(m) != 0 {
			return fmt.Errorf("stages left: %v", m)
		}
		return nil
	})
}

// TestPrepareContainerdRestarts: containerd finds a prepared container again as
// it left it.
func TestPrepareContainerdRestarts(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key, checkpoint.AnnotationPolicy, "reboot"))
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(3)
	c.prepare()
	at := c.wantStill()
	if err := syscall.Kill(daemonPID(t, "containerd"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	run(t, "/src/test/node/up", "containerd")
	eventually(t, "containerd", func() error {
		r, err := n.rt.ContainerStatus(n.ctx(), &cri.ContainerStatusRequest{ContainerId: c.id})
		if err == nil && r.Status.State != cri.ContainerState_CONTAINER_RUNNING {
			err = fmt.Errorf("state %v", r.Status.State)
		}
		return err
	})
	if _, err := c.exec("true"); err == nil || !strings.Contains(err.Error(), "prepare-reboot --abort") {
		t.Errorf("exec: %v", err)
	}
	if now := c.wantStill(); now != at {
		t.Errorf("it counted from %d to %d", at, now)
	}
	wantRecords(t, key, 1)
	c.abort()
	c.waitCount(at + 3)
	wantRecords(t, key, 0)
	c.stop(0)
}

// TestPrepareNoSpace: where the dump finds no room, before or in the middle of
// it, the container runs on.
func TestPrepareNoSpace(t *testing.T) {
	for _, tc := range []struct {
		size    string
		layerMB int
	}{{"32m", 0}, {"69m", 100}} {
		t.Run(tc.size, func(t *testing.T) {
			n, key := newNode(t), uniqueKey(t)
			smallStore(t, tc.size)
			p := n.runPod(key, annotate(key, checkpoint.AnnotationPolicy, "reboot"))
			c := p.start("c", "busybox", shell(trapping))
			c.mustExec("/bin/sh", "-c", fmt.Sprintf("dd if=/dev/urandom of=/big bs=1M count=%d 2>/dev/null", tc.layerMB))
			at := c.waitCount(3)
			_, err := c.shim().Prepare(n.ctx(), c.id)
			if err == nil || tc.layerMB == 0 && !errdefs.IsResourceExhausted(err) {
				t.Errorf("prepared without room: %v", err)
			}
			t.Logf("prepare: %v", err)
			c.waitCount(max(at, c.lastCount()) + 3)
			c.wantState(control.Running)
			c.mustExec("true")
			e := wantEvent(t, key, event.DumpFailed, "no-space")
			if !strings.HasPrefix(e.Reason, "node reboot: ") {
				t.Errorf("reason %q", e.Reason)
			}
			wantRecords(t, key, 0)
			assertNothingFrozen(t)
			c.stop(30)
			if st := c.status(); st.ExitCode != 7 {
				t.Errorf("exit code %d, want the program's own 7", st.ExitCode)
			}
			p.remove()
		})
	}
}

// TestPrepareInterrupted: what comes in the middle of the dump of a large
// container has an effect that is whole.
func TestPrepareInterrupted(t *testing.T) {
	for _, tc := range []struct {
		name string
		then func(t *testing.T, n *node, c *ctr, leave context.CancelFunc)
	}{
		{"caller leaves", func(t *testing.T, n *node, c *ctr, leave context.CancelFunc) {
			leave()
			if r := c.prepare(); !r.Already {
				t.Errorf("result %+v", r)
			}
			c.wantState(control.Prepared)
			c.stop(30)
			c.wantKilled()
		}},
		{"abort", func(t *testing.T, n *node, c *ctr, _ context.CancelFunc) {
			c.abort()
			c.wantState(control.Running)
			c.mustExec("true")
			assertNothingFrozen(t)
		}},
		{"stop", func(t *testing.T, n *node, c *ctr, _ context.CancelFunc) {
			c.stop(30)
			c.wantKilled()
		}},
		{"kill", func(t *testing.T, n *node, c *ctr, _ context.CancelFunc) {
			c.stop(0)
			c.wantKilled()
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, key := newNode(t), uniqueKey(t)
			p := n.runPod(key, annotate(key, checkpoint.AnnotationPolicy, "reboot"))
			c := p.start("c", "python", []string{"python3", "-c", bigHeap})
			c.waitLog("ready")
			ctx, leave := context.WithCancel(n.ctx())
			defer leave()
			done := make(chan error, 1)
			go func() {
				_, err := c.shim().Prepare(ctx, c.id)
				done <- err
			}()
			eventually(t, "the dump's begin", func() error {
				if m, _ := filepath.Glob(filepath.Join(storeRoot, ".stage-*/checkpoint/*.img")); len(m) == 0 {
					return errors.New("no images")
				}
				return nil
			})
			c.wantState(control.Busy)
			if st := c.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
				t.Errorf("state %v", st.State)
			}
			tc.then(t, n, c, leave)
			prepared := <-done
			t.Logf("prepare: %v", prepared)
			want := map[string]int{"caller leaves": 1, "abort": 0, "stop": 1, "kill": 0}[tc.name]
			wantRecords(t, key, want)
			p.remove()
			assertNothingFrozen(t)
		})
	}
}

// lastTime is that of the newest line in the log.
func (c *ctr) lastTime() time.Time {
	c.p.n.t.Helper()
	lines := regexp.MustCompile(`(?m)^(\S+) stdout F count`).FindAllStringSubmatch(c.log(), -1)
	if len(lines) == 0 {
		c.p.n.t.Fatal("no line")
	}
	at, err := time.Parse(time.RFC3339Nano, lines[len(lines)-1][1])
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	return at
}

// prepareAll prepares all at once and returns when the first result was there.
func prepareAll(t *testing.T, cs ...*ctr) (first time.Time) {
	t.Helper()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, c := range cs {
		shim, ctx := c.shim(), c.p.n.ctx()
		wg.Go(func() {
			r, err := shim.Prepare(ctx, c.id)
			mu.Lock()
			defer mu.Unlock()
			if first.IsZero() {
				first = time.Now()
			}
			if err != nil {
				t.Errorf("prepare %s: %v", c.config.Metadata.Name, err)
			}
			t.Logf("%s: %v, of it in CRIU %d ms", c.config.Metadata.Name, r.Duration, r.Timings.CRIUMicros/1000)
		})
	}
	wg.Wait()
	return first
}

// TestPrepareMany: more containers than dump slots stand still together.
func TestPrepareMany(t *testing.T) {
	n := newNode(t)
	var cs []*ctr
	var keys []string
	for range 4 {
		key := uniqueKey(t)
		p := n.runPod(key, annotate(key, checkpoint.AnnotationPolicy, "reboot"))
		cs, keys = append(cs, p.start("c", "busybox", shell(counting))), append(keys, key)
	}
	for _, c := range cs {
		c.waitCount(3)
	}
	first := prepareAll(t, cs...)
	for i, c := range cs {
		at := c.wantStill()
		if last := c.lastTime(); last.After(first) {
			t.Errorf("it ran at %v, when another one was dumped at %v already", last, first)
		}
		c.wantState(control.Prepared)
		wantRecords(t, keys[i], 1)
		if i%2 == 0 {
			c.abort()
			c.waitCount(at + 3)
			continue
		}
		c.stop(30)
		c.p.remove()
		p := n.runPod(keys[i], annotate(keys[i], checkpoint.AnnotationPolicy, "reboot"))
		p.start("c", "busybox", shell(counting)).wantFirst(at + 1)
	}
	assertNothingFrozen(t)
}

// TestPrepareSharedVolume: two containers of a pod with a memory-backed volume
// go on with it as it was when both stood still.
func TestPrepareSharedVolume(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	annotations := annotate(key, checkpoint.AnnotationPolicy, "reboot")
	// The writer keeps the count in the volume and in memory, the reader follows.
	writer := shell(`n=0; while :; do n=$((n+1)); echo $n >/scratch/n.new; mv /scratch/n.new /scratch/n; echo "count $n x"; sleep 0.05; done`)
	reader := shell(`while :; do [ -e /scratch/n ] && echo "count $(cat /scratch/n) x"; sleep 0.05; done`)
	create := func(dir string) (p *pod, w, r *ctr) {
		p = n.runPod(key, annotations)
		w = p.start("w", "busybox", writer, withMount(dir, "/scratch"))
		r = p.start("r", "busybox", reader, withMount(dir, "/scratch"))
		return p, w, r
	}
	v1 := memoryVolume(t, key+"-1")
	p, w, r := create(v1)
	r.waitCount(5)
	prepareAll(t, w, r)
	at := w.wantStill()
	held, err := os.ReadFile(filepath.Join(v1, "n"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("frozen at count %d with %q in the volume", at, strings.TrimSpace(string(held)))
	r.wantStill()
	for _, c := range []*ctr{w, r} {
		c.stop(30)
		c.wantKilled()
	}
	p.remove()
	_, w, r = create(memoryVolume(t, key+"-2"))
	w.wantFirst(at + 1)
	r.waitCount(at + 1)
	ns, _ := counts(r.log())
	if ns[0] < at-1 {
		t.Errorf("the reader saw %d in a volume that held %d", ns[0], at)
	}
	assertNothingFrozen(t)
}
