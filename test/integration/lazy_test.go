package integration

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// patterned is a program of some processes, each of which compares so many MiB
// of memory with its checksums over and over, and says BAD where it is not as it
// was. Where the memory is shared, all have it from before the fork.
func patterned(mb, processes int, shared bool, marker string) []string {
	return []string{"python3", "-c", fmt.Sprintf(`
import os, time, zlib
marker = %q
blocks, sums = [], []
def fill():
    global blocks, sums
    blocks = [os.urandom(1 << 20) for _ in range(%d)]
    sums = [zlib.crc32(b) for b in blocks]
if %d: fill()
for _ in range(%d):
    if os.fork() == 0: break
if not blocks: fill()
n = 0
while True:
    bad = sum(zlib.crc32(b) != s for b, s in zip(blocks, sums))
    if bad: print("BAD", bad, flush=True)
    n += 1
    print("round %%d of %%d" %% (n, os.getpid()), flush=True)
    time.sleep(0.02)
`, marker, mb, map[bool]int{true: 1}[shared], processes-1)}
}

var roundLine = regexp.MustCompile(`round (\d+) of (\d+)`)

// waitRounds waits until each process has looked at all its memory twice, the
// first of which may have begun before a restore, and returns the last rounds.
func (c *ctr) waitRounds(processes int) map[string]int {
	c.p.n.t.Helper()
	last := map[string]int{}
	eventually(c.p.n.t, "rounds of the program", func() error {
		rounds := map[string]int{}
		for _, m := range roundLine.FindAllStringSubmatch(c.log(), -1) {
			last[m[2]], _ = strconv.Atoi(m[1])
			rounds[m[2]]++
		}
		for _, n := range rounds {
			if n < 2 {
				rounds = nil
			}
		}
		if len(rounds) < processes {
			return fmt.Errorf("log ends with %q", tail(c.log(), 200))
		}
		return nil
	})
	c.wantNoLoss()
	return last
}

func (c *ctr) wantNoLoss() {
	c.p.n.t.Helper()
	if strings.Contains(c.log(), "BAD") {
		c.p.n.t.Errorf("memory was lost: %q", tail(c.log(), 200))
	}
}

// withCommand finds the processes with a text in their command line.
func withCommand(text string) (pids []int) {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), text) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// holders finds the processes that hold memory for a shim.
func holders() []int { return withCommand("stasis-memory-holder\x00") }

// wantNoneLeft waits for the end of the program's processes and of holders.
func wantNoneLeft(t *testing.T, marker string) {
	t.Helper()
	eventually(t, "end of all processes", func() error {
		if pids := append(withCommand(marker), holders()...); len(pids) > 0 {
			return fmt.Errorf("processes %v are left", pids)
		}
		return nil
	})
}

// readByCRIU tells whether CRIU read all memory itself.
func (c *ctr) readByCRIU() bool {
	c.p.n.t.Helper()
	b, err := os.ReadFile(filepath.Join("/run/containerd/io.containerd.runtime.v2.task/k8s.io", c.id, "work/restore.log"))
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	return !strings.Contains(string(b), "uffd")
}

// wantLazy fails unless the container was restored without its memory.
func (c *ctr) wantLazy() {
	c.p.n.t.Helper()
	if c.readByCRIU() {
		c.p.n.t.Error("CRIU read all memory itself")
	}
}

// rounds are the last of each process.
func (c *ctr) rounds() map[string]int {
	rounds := map[string]int{}
	for _, m := range roundLine.FindAllStringSubmatch(c.log(), -1) {
		rounds[m[2]], _ = strconv.Atoi(m[1])
	}
	return rounds
}

// wantGoesOn fails unless each process has looked at its memory twice more.
func (c *ctr) wantGoesOn(before map[string]int) {
	c.p.n.t.Helper()
	for pid, round := range c.waitRounds(len(before)) {
		if round < before[pid]+2 {
			c.p.n.t.Errorf("process %s is in round %d, was in %d", pid, round, before[pid])
		}
	}
}

// dumped makes a pod with the program and stops it, so that there is a record.
func dumped(t *testing.T, n *node, key string, command []string, processes int, opts ...ctrOption) map[string]int {
	t.Helper()
	p := n.runPod(key, annotate(key))
	c := p.start("c", "python", command, opts...)
	c.waitRounds(processes)
	c.stop(60)
	wantEvent(t, key, event.Dumped, "")
	p.remove()
	return c.rounds()
}

// allRecords lists what [records] does, and what is claimed.
func allRecords(t *testing.T, key string) []string {
	t.Helper()
	id := checkpoint.Identity{Namespace: "default", Key: key, Container: "c"}
	claimed, err := filepath.Glob(filepath.Join(storeRoot, "claimed", id.Hash(), "*"))
	if err != nil {
		t.Fatal(err)
	}
	return append(records(t, key), slices.DeleteFunc(claimed, func(name string) bool { return strings.HasSuffix(name, ".owner") })...)
}

// wantNoRecord waits until the record is used up.
func wantNoRecord(t *testing.T, key string) {
	t.Helper()
	eventually(t, "end of the record", func() error {
		if rs := allRecords(t, key); len(rs) != 0 {
			return fmt.Errorf("records %v", rs)
		}
		return nil
	})
}

// wantPhases fails unless the restore had these parts, and no more time went by
// in them than in all.
func wantPhases(t *testing.T, e event.Event, names ...string) {
	t.Helper()
	sum, seen := int64(0), map[string]int64{}
	for _, p := range e.Phases {
		seen[p.Name] = p.Micros
		sum += p.Micros
	}
	for _, name := range names {
		if took, ok := seen[name]; !ok || took < 0 {
			t.Errorf("phase %q: %d us, of %v", name, took, e.Phases)
		}
	}
	if seen["criu"] == 0 || sum > e.DurationMicros || sum < e.DurationMicros/10 || len(seen) != len(names) {
		t.Errorf("phases %v of %d us", e.Phases, e.DurationMicros)
	}
}

// TestLazyMemory restores programs whose memory is filled while they run
// already, stops them at once, and restores them again.
func TestLazyMemory(t *testing.T) {
	for _, processes := range []int{1, 4} {
		t.Run(fmt.Sprint(processes), func(t *testing.T) {
			n, key := newNode(t), uniqueKey(t)
			command := patterned(300/processes, processes, false, "marker-"+key)
			before := dumped(t, n, key, command, processes)
			for generation := range 3 {
				p := n.runPod(key, annotate(key))
				c := p.start("c", "python", command)
				c.wantLazy()
				wantPhases(t, wantEvent(t, key, event.Restored, ""), "claim", "prepare", "verify", "layers", "create", "pager", "tmpfs", "criu", "runc")
				if generation == 1 {
					c.stop(60) // at once
					wantEvent(t, key, event.Dumped, "")
					c.wantNoLoss()
					p.remove()
					continue
				}
				c.wantGoesOn(before)
				wantNoRecord(t, key)
				eventually(t, "end of the holder", func() error {
					if pids := holders(); len(pids) > 0 {
						return fmt.Errorf("holders %v", pids)
					}
					return nil
				})
				c.stop(60)
				wantEvent(t, key, event.Dumped, "")
				p.remove()
			}
			wantNoneLeft(t, "marker-"+key)
		})
	}
}

// TestLazySIGKILL: SIGKILL does not wait until memory is full, and uses up the
// record as it does that of any container that ran.
func TestLazySIGKILL(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	command := patterned(300, 1, false, "marker-"+key)
	dumped(t, n, key, command, 1)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "python", command)
	c.wantLazy()
	begin := time.Now()
	c.stop(0)
	if d := time.Since(begin); d > time.Duration(slow)*3*time.Second {
		t.Errorf("SIGKILL took %s", d)
	}
	if st := c.status(); st.ExitCode != 137 {
		t.Errorf("exit code %d, want 137", st.ExitCode)
	}
	wantEvent(t, key, event.Restored, "")
	wantNoRecord(t, key)
	wantNoneLeft(t, "marker-"+key)
	p.remove()
}

// TestLazyNot: where a pager brings nothing, would cost memory, or is not
// wanted, CRIU alone restores, and where that may be a surprise the event tells.
func TestLazyNot(t *testing.T) {
	limited := func(c *cri.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = 225 << 20 }
	for name, tt := range map[string]struct {
		mb, processes int
		shared        bool
		opts          []ctrOption
		annotations   []string
		reason        string
	}{
		"little":     {mb: 1, processes: 1},
		"not wanted": {mb: 80, processes: 1, annotations: []string{checkpoint.AnnotationMemory, "eager"}},
		"shared":     {mb: 80, processes: 3, shared: true, reason: "since a fork"},
		"limit":      {mb: 200, processes: 1, opts: []ctrOption{limited}, reason: "memory limit"},
	} {
		t.Run(name, func(t *testing.T) {
			n, key := newNode(t), uniqueKey(t)
			command := patterned(tt.mb, tt.processes, tt.shared, "marker-"+key)
			before := dumped(t, n, key, command, tt.processes, tt.opts...)
			p := n.runPod(key, annotate(key, tt.annotations...))
			c := p.start("c", "python", command, tt.opts...)
			if !c.readByCRIU() {
				t.Error("restored with a pager")
			}
			e := wantEvent(t, key, event.Restored, "")
			if !strings.Contains(e.Reason, tt.reason) || tt.reason == "" && e.Reason != "" {
				t.Errorf("reason %q, want %q", e.Reason, tt.reason)
			}
			c.wantGoesOn(before)
			p.remove()
		})
	}
}

// TestLazyBusy has a container dumped at once after the start, in all other
// ways: by the CRI call, for a template, for a reboot. Nothing is missing in
// what comes of it.
func TestLazyBusy(t *testing.T) {
	const mb = 600
	n, key := newNode(t), uniqueKey(t)
	command := patterned(mb, 1, false, "marker-"+key)
	before := dumped(t, n, key, command, 1)
	restored := func() *ctr {
		t.Helper()
		p := n.runPod(key, annotate(key))
		c := p.start("c", "python", command)
		c.wantLazy()
		return c
	}

	c := restored()
	archive := filepath.Join(t.TempDir(), "checkpoint.tar")
	if _, err := n.rt.CheckpointContainer(n.ctx(), &cri.CheckpointContainerRequest{ContainerId: c.id, Location: archive, Timeout: 50}); err != nil {
		t.Errorf("checkpoint: %v", err)
	} else if fi, err := os.Stat(archive); err != nil || fi.Size() < mb<<20 {
		t.Errorf("archive: %v, %v", fi, err)
	}
	os.Remove(archive)
	c.wantGoesOn(before)
	c.stop(60)
	c.p.remove()

	c = restored()
	c.prepare()
	c.stop(60)
	c.p.remove()
	c = restored()
	c.wantGoesOn(before)
	c.p.remove()

	first, name := uniqueKey(t), uniqueKey(t)
	removeTemplate(t, first)
	removeTemplate(t, name)
	src := n.runPod(first, map[string]string{checkpoint.AnnotationPolicy: "template"}).start("c", "python", command)
	before = src.waitRounds(1)
	src.makeTemplate(t, first)
	src.p.remove()
	c = clonePod(n, first).start("c", "python", command)
	c.wantLazy()
	c.makeTemplate(t, name)
	c.wantGoesOn(before)
	c.p.remove()
	var clones []*ctr
	for range 2 {
		clones = append(clones, &ctr{p: clonePod(n, name)})
	}
	var wg sync.WaitGroup
	for i, clone := range clones { // at once, from the same pages
		wg.Go(func() {
			got, err := clone.p.tryCreate("c", "python", command)
			if err == nil {
				err = got.tryStart()
			}
			if err != nil {
				t.Errorf("clone %d: %v", i, err)
				return
			}
			clones[i] = got
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, clone := range clones {
		clone.wantLazy()
		clone.wantGoesOn(before)
		clone.p.remove()
	}
	if pins := templatePins(t, name); len(pins) != 0 {
		t.Errorf("pins %v", pins)
	}
	wantNoneLeft(t, "marker-"+key)
}

// TestLazyCgroups: what is filled is charged to the container, and the holder,
// like the shim, is not in the container's cgroup.
func TestLazyCgroups(t *testing.T) {
	const mb = 300
	n, key := newNode(t), uniqueKey(t)
	command := patterned(mb, 1, false, "marker-"+key)
	before := dumped(t, n, key, command, 1)
	p := n.runPod(key, annotate(key))
	c, err := p.tryCreate("c", "python", command)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan string, 1)
	go func() { // the holder is gone soon
		defer close(seen)
		for end := time.Now().Add(deadline / 2); time.Now().Before(end); {
			for _, pid := range holders() {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
				if err == nil {
					seen <- string(b)
					return
				}
			}
		}
	}()
	if err := c.tryStart(); err != nil {
		t.Fatal(err)
	}
	if groups, ok := <-seen; !ok {
		t.Error("no holder was seen")
	} else if strings.Contains(groups, c.id) {
		t.Errorf("the holder is in the container's cgroup: %s", groups)
	}
	c.wantGoesOn(before)
	eventually(t, "memory in the statistics", func() error {
		r, err := n.rt.ContainerStats(n.ctx(), statsRequest(c.id))
		if err != nil {
			return err
		}
		if got := r.Stats.GetMemory().GetRssBytes().GetValue(); got < mb<<20 {
			return fmt.Errorf("%d bytes", got)
		}
		return nil
	})
	p.remove()
}

// TestLazyKill9 kills, at random moments of a restore and of the filling, the
// holder, the shim, containerd and the daemon. The container goes on with all
// its memory, or it dies; it never goes on without. A record whose container
// died with its shim before its memory was full is there again; one that could
// not be filled is set aside.
func TestLazyKill9(t *testing.T) {
	for victim, faults := range map[string]int{"holder": 6, "shim": 6, "containerd": 3, "stasisd": 3} {
		t.Run(victim, func(t *testing.T) {
			n, key := newNode(t), uniqueKey(t)
			outcome := map[string]int{}
			for range faults {
				if t.Failed() {
					break
				}
				lazyFault(t, n, victim, key, outcome)
			}
			restart(t, "stasisd") // sweeps what a killed shim had staged
			t.Logf("%v", outcome)
			if outcome["died"] == 0 && (victim == "holder" || victim == "shim") {
				t.Error("no fault hit the filling")
			}
			if victim == "shim" && outcome["used once more"] == 0 {
				t.Error("no record was given back")
			}
		})
	}
}

// TestLazyStartHangs: the holder dies, and the restore does not end by itself, for runc
// hangs. The tasks, which wait for memory that nobody fills any more, are killed; when runc
// goes on, so does the start.
func TestLazyStartHangs(t *testing.T) {
	const processes = 2
	n := newNode(t)
	for range 5 {
		key := uniqueKey(t)
		marker := "marker-" + key
		command := patterned(100, processes, false, marker)
		dumped(t, n, key, command, processes)
		p := n.runPod(key, annotate(key))
		c, err := p.tryCreate("c", "python", command)
		if err != nil {
			t.Fatal(err)
		}
		struck := make(chan error, 1)
		go func() {
			for end := time.Now().Add(deadline / 2); len(withCommand(marker)) == 0 && time.Now().Before(end); {
			}
			var stopped []int
			for _, pid := range withCommand("\x00restore\x00") {
				if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && strings.Contains(string(b), c.id) {
					syscall.Kill(pid, syscall.SIGSTOP)
					stopped = append(stopped, pid)
				}
			}
			for _, pid := range holders() {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			err := errors.New("the tasks live")
			for end := time.Now().Add(time.Duration(15*slow) * time.Second); err != nil && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
				if len(withCommand(marker)) == 0 {
					err = nil
				}
			}
			for _, pid := range stopped {
				syscall.Kill(pid, syscall.SIGCONT)
			}
			struck <- err
		}()
		if err := errors.Join(c.tryStart(), <-struck); err != nil {
			t.Fatal(err)
		}
		c.wantNoLoss()
		if len(c.shimLines("the restore does not end without its pager")) == 0 { // runc was faster
			p.remove()
			wantNoneLeft(t, marker)
			continue
		}
		eventually(t, "quarantine of the checkpoint", func() error { // by the pager, or by CRIU where it was not through
			if es := events(t, key); !slices.ContainsFunc(es, func(e event.Event) bool { return e.Type == event.Quarantined }) {
				return fmt.Errorf("events %+v", es)
			}
			return nil
		})
		p.remove()
		wantNoneLeft(t, marker)
		wantNoRecord(t, key)
		return
	}
	t.Error("no restore was struck before its end")
}

func lazyFault(t *testing.T, n *node, victim, key string, outcome map[string]int) {
	const processes = 2
	marker := "marker-" + key
	command := patterned(150, processes, false, marker)
	var before map[string]int
	again := len(allRecords(t, key)) > 0
	if !again {
		before = dumped(t, n, key, command, processes)
	}
	p := n.runPod(key, annotate(key))
	c, err := p.tryCreate("c", "python", command)
	if err != nil {
		t.Fatal(err)
	}
	struck := make(chan struct{})
	go func() {
		defer close(struck)
		// The tasks have their names a moment before CRIU is done with them.
		for end := time.Now().Add(deadline / 2); len(withCommand(marker)) == 0 && time.Now().Before(end); {
		}
		time.Sleep(time.Duration(rand.IntN(int(100*slow))) * time.Millisecond)
		switch victim {
		case "holder", "shim":
			pids := holders()
			if victim == "shim" {
				pids = shimPIDs(p.id)
			}
			for _, pid := range pids {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		default:
			restart(t, victim)
		}
	}()
	err = c.tryStart()
	<-struck
	dies := victim == "shim"
	switch victim {
	case "holder":
		if err != nil {
			t.Errorf("start: %v", err)
		}
		// Either full when the holder was killed, or dead soon.
		eventually(t, "rounds of the program, or its end", func() error {
			seen := map[string]int{}
			for _, m := range roundLine.FindAllStringSubmatch(c.log(), -1) {
				seen[m[2]]++
			}
			dies = c.status().State != cri.ContainerState_CONTAINER_RUNNING
			if all := len(seen) == processes && !slices.ContainsFunc(slices.Collect(maps.Values(seen)), func(n int) bool { return n < 2 }); all || dies {
				return nil
			}
			return fmt.Errorf("log ends with %q", tail(c.log(), 200))
		})
	case "containerd":
		if err != nil { // it was not there to answer
			dies = true
		}
	}
	if dies {
		outcome["died"]++
		if victim == "containerd" {
			n.rt.StopContainer(n.ctx(), stopRequest(c.id, 0)) // as the kubelet would
		}
		eventually(t, "end of the container", func() error {
			if st := c.status(); st.State == cri.ContainerState_CONTAINER_RUNNING {
				return fmt.Errorf("state %v", st.State)
			}
			return nil
		})
		if victim == "holder" {
			if st := c.status(); st.ExitCode != 137 {
				t.Errorf("exit code %d, want 137; log %q", st.ExitCode, tail(c.log(), 200))
			}
			wantEvent(t, key, event.RestoreFail, "pager")
			wantEvent(t, key, event.Quarantined, "pager")
		}
	} else {
		outcome["ran on"]++
		wantEvent(t, key, event.Restored, "")
		c.waitRounds(processes)
		if again {
			outcome["used once more"]++
		} else {
			c.wantGoesOn(before)
		}
		wantNoRecord(t, key)
		c.stop(60)
	}
	c.wantNoLoss()
	p.removeEventually()
	wantNoneLeft(t, marker)
	if dies && victim == "shim" && len(allRecords(t, key)) > 0 {
		// It fills again, and this time nobody disturbs it.
		p := n.runPod(key, annotate(key))
		c := p.start("c", "python", command)
		c.waitRounds(processes)
		if before != nil {
			c.wantGoesOn(before)
		}
		outcome["used once more"]++
		wantNoRecord(t, key)
		c.stop(60)
		p.remove()
	}
}

// TestLazyDamaged: nothing of a damaged block of a template gets into a clone's
// memory. One that is found when the clone runs is its end, and that of the
// template; what comes next begins cold.
func TestLazyDamaged(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	command := patterned(150, 1, false, "marker-"+name)
	src := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"}).start("c", "python", command)
	src.waitRounds(1)
	version := src.makeTemplate(t, name)
	pages, err := filepath.Glob(filepath.Join(storeRoot, "templates/default", name, version, "checkpoint/pages-*.img"))
	if err != nil || len(pages) != 1 {
		t.Fatalf("pages %v: %v", pages, err)
	}
	f, err := os.OpenFile(pages[0], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := int64(150 << 20)
	var b [1]byte
	if _, err := f.ReadAt(b[:], size/2); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], size/2); err != nil {
		t.Fatal(err)
	}
	src.p.remove()

	c := clonePod(n, name).start("c", "python", command)
	c.wantLazy()
	eventually(t, "end of the clone", func() error {
		if st := c.status(); st.State == cri.ContainerState_CONTAINER_RUNNING {
			return fmt.Errorf("state %v, log ends with %q", st.State, tail(c.log(), 200))
		}
		return nil
	})
	if st := c.status(); st.ExitCode != 137 {
		t.Errorf("exit code %d, want 137", st.ExitCode)
	}
	c.wantNoLoss()
	c.p.wantOutcome(event.RestoreFail, "corrupt", "checksum")
	if out := run(t, "stasis", "ls", "--state", "quarantined"); !strings.Contains(out, version) {
		t.Errorf("it is not quarantined:\n%s", out)
	}
	c.p.remove()
	again := clonePod(n, name).start("c", "python", command)
	again.waitRounds(1)
	again.p.wantOutcome(event.ColdStart, "missing", name)
	run(t, "stasis", "rm", version)
	again.p.remove()
	wantNoneLeft(t, "marker-"+name)
}
