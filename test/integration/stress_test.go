package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/url"
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

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// stress is how often the tests of this file do things. STASIS_STRESS=full is
// for a machine that has hours, the other counts for one that has minutes.
var stress = func() (s struct{ sequence, rounds, atOnce, kills, removals, collected int }) {
	s.sequence, s.rounds, s.atOnce, s.kills, s.removals, s.collected = 5, 1, 4, 4, 1, 1
	if os.Getenv("STASIS_STRESS") == "full" {
		s.sequence, s.rounds, s.atOnce, s.kills, s.removals, s.collected = 200, 10, 16, 100, 20, 10
	}
	return s
}()

// memories are the ways in which a clone gets the template's memory, in turn.
var memories = []checkpoint.Memory{checkpoint.MemoryLazy, checkpoint.MemoryMapped}

// warm is the command of a JVM with the class Warm of the image java, which see.
func warm(megabytes, threads int, flags ...string) []string {
	command := append([]string{"/opt/java/bin/java", "-XX:TieredStopAtLevel=1"}, flags...)
	return append(command, fmt.Sprintf("-Dwarm.megabytes=%d", megabytes), fmt.Sprintf("-Dwarm.threads=%d", threads),
		"-cp", "/opt/java/classes", "Warm")
}

// instance is what a Warm says of itself. Its heap follows from when it started.
type instance struct {
	id                    string
	started, ticks, bytes int64
}

// sum is the right answer to a question for the sum.
func (i instance) sum() string {
	number, sum := uint64(i.started), uint64(0)
	for range i.bytes / 8 {
		number = number*6364136223846793005 + 1442695040888963407
		sum = sum*31 + number
	}
	return strconv.FormatUint(sum, 10)
}

// get asks the pod's port 8080 over a connection of its own.
func (p *pod) get(path string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), deadline/2)
	defer cancel()
	st, err := p.n.rt.PodSandboxStatus(ctx, podStatusRequest(p.id))
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+st.Status.GetNetwork().GetIp()+":8080/"+path, nil)
	if err != nil {
		return "", err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("/%s: %s", path, resp.Status)
	}
	return string(body), err
}

// instance waits for the Warm of the pod to answer.
func (p *pod) instance() (i instance, err error) {
	for end := time.Now().Add(deadline); ; time.Sleep(20 * time.Millisecond) {
		var body string
		if body, err = p.get(""); err == nil {
			if _, err := fmt.Sscan(body, &i.id, &i.started, &i.ticks, &i.bytes); err != nil {
				return i, fmt.Errorf("it answers %q: %w", body, err)
			}
			return i, nil
		}
		if time.Now().After(end) {
			return i, err
		}
	}
}

// check compares every byte of the heap with what it must be, before and, with
// gc, after the collector has moved it.
func (p *pod) check(gc bool) (instance, error) {
	i, err := p.instance()
	if err != nil {
		return i, err
	}
	questions := []string{"sum"}
	if gc {
		questions = append(questions, "gc")
	}
	for _, q := range questions {
		if got, err := p.get(q); err != nil {
			return i, err
		} else if want := i.sum(); got != want {
			return i, fmt.Errorf("/%s of an instance started at %d: %s, want %s", q, i.started, got, want)
		}
	}
	return i, nil
}

// clone creates and starts the container of a pod that names a template.
func (p *pod) clone(command []string) (*ctr, error) {
	c, err := p.tryCreate("c", "java", command)
	if err == nil {
		err = c.tryStart()
	}
	return c, err
}

// checkClone is check for a pod whose container may have begun from the
// template of src. It tells whether it did, and that the event log has it right, with
// mapped memory where the pod asks for that.
func (p *pod) checkClone(src instance, gc bool) (fromTemplate bool, err error) {
	i, err := p.check(gc)
	if err != nil {
		return false, err
	}
	if i.id != src.id {
		return false, nil
	}
	if i.ticks < src.ticks || i.bytes != src.bytes || i.started != src.started {
		return true, fmt.Errorf("%+v does not go on from %+v", i, src)
	}
	for _, e := range events(p.n.t, p.config.Metadata.Uid) {
		if e.Type == event.Restored {
			want := p.config.Annotations[checkpoint.AnnotationMemory] == string(checkpoint.MemoryMapped)
			if got := strings.Contains(e.Reason, "of memory are mapped from it"); got != want {
				return true, fmt.Errorf("mapped: %v, want %v; reason %q", got, want, e.Reason)
			}
			return true, nil
		}
	}
	return true, fmt.Errorf("no event tells that %s began from the template", p.config.Metadata.Name)
}

// leavings looks for what a test with a template left behind.
type leavings struct {
	processes map[string]bool // that were there before
	name      string          // of the template
	ids       []string        // of sandboxes and containers that were removed
}

// newLeavings begins a test that makes a template of the name.
func newLeavings(name string) *leavings { return &leavings{processes: ourProcesses(), name: name} }

// remove removes a pod and keeps its ids.
func (l *leavings) remove(p *pod) {
	p.n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	r, err := p.n.rt.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.id}})
	if err != nil {
		p.n.t.Errorf("list containers: %v", err)
	}
	l.ids = append(l.ids, p.id)
	for _, c := range r.GetContainers() {
		l.ids = append(l.ids, c.Id)
	}
	p.removeEventually()
}

// ourProcesses are shims, what they run, and JVMs: "PID COMMAND".
func ourProcesses() map[string]bool {
	found := map[string]bool{}
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		args := strings.Split(string(b), "\x00")
		switch filepath.Base(args[0]) {
		case "containerd-shim-stasis-v2", "runc", "criu", "java", "pause":
			found[filepath.Base(filepath.Dir(name))+" "+strings.Join(args, " ")] = true
		}
	}
	return found
}

// check removes the template and then finds nothing of the removed pods: no
// process, mount, cgroup, stage, claim, pin or generation. The kernel and
// containerd take a moment to forget.
func (l *leavings) check(t *testing.T) {
	t.Helper()
	eventually(t, "template rm", func() error {
		out, err := exec.Command("stasis", "template", "rm", "default/"+l.name).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "no template") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	eventually(t, "end of everything", l.left)
	assertNothingFrozen(t)
}

func (l *leavings) left() error {
	var left []string
	for p := range ourProcesses() {
		if !l.processes[p] {
			left = append(left, "process "+p)
		}
	}
	named := func(text string) bool {
		return slices.ContainsFunc(l.ids, func(id string) bool { return strings.Contains(text, id) })
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if named(line) {
			left = append(left, "mount "+line)
		}
	}
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && named(d.Name()) {
			left = append(left, "cgroup "+path)
		}
		return nil
	})
	for _, pattern := range []string{
		storeRoot + "/.stage-*", storeRoot + "/.trash-*", storeRoot + "/claimed/*/*",
		storeRoot + "/templates/default/" + l.name + "/*",
	} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	generations, _ := filepath.Glob("/run/stasis/generations/*")
	left = append(left, slices.DeleteFunc(generations, func(g string) bool { return !named(g) })...)
	if len(left) > 0 {
		return fmt.Errorf("%d things are left: %s", len(left), strings.Join(left[:min(len(left), 20)], "\n"))
	}
	return nil
}

// warmTemplate makes a template of a warm JVM.
func warmTemplate(t *testing.T, n *node, name string, command []string) (*pod, instance) {
	t.Helper()
	p := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"})
	c := p.start("c", "java", command)
	src, err := p.instance()
	if err != nil {
		t.Fatal(err)
	}
	c.makeTemplate(t, name)
	return p, src
}

// TestCloneStress clones a JVM again and again, and whatever is killed or
// removed meanwhile, a clone has the heap of the template, every byte of it, or
// starts cold, or is gone; and nothing of it is left in the end.
func TestCloneStress(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	l := newLeavings(name)
	removeTemplate(t, name)
	command := warm(8, 0, "-XX:+UseSerialGC", "-Xmx32m")
	source, src := warmTemplate(t, n, name, command)

	// clones starts as many at a time, while meddle, which gets the pods, meddles. The
	// memory of each other one is mapped.
	started := 0
	clones := func(t *testing.T, count int, meddle func([]*pod)) (fromTemplate int, failed []*pod) {
		n := newNode(t)
		pods := make([]*pod, count)
		for i := range pods {
			pods[i] = clonePod(n, name, checkpoint.AnnotationMemory, string(memories[started%len(memories)]))
			started++
		}
		errs := make([]error, count)
		var wg sync.WaitGroup
		for i, p := range pods {
			wg.Go(func() { _, errs[i] = p.clone(command) })
		}
		if meddle != nil {
			wg.Go(func() { meddle(pods) })
		}
		wg.Wait()
		for i, p := range pods {
			if errs[i] != nil {
				t.Logf("clone %d of %d: %v", i, count, errs[i])
				failed = append(failed, p)
				continue
			}
			if len(shimPIDs(p.id)) == 0 {
				failed = append(failed, p)
				continue
			}
			warm, err := p.checkClone(src, false)
			if lost := (*url.Error)(nil); errors.As(err, &lost) && len(shimPIDs(p.id)) == 0 {
				// It was not yet gone when it was looked for: the clone died while it was asked.
				t.Logf("clone %d of %d: %v", i, count, err)
				failed = append(failed, p)
				continue
			}
			if err != nil {
				t.Errorf("clone %d of %d: %v", i, count, err)
			}
			if warm {
				fromTemplate++
			}
		}
		for _, p := range pods {
			if !slices.Contains(failed, p) {
				l.remove(p)
			}
		}
		return fromTemplate, failed
	}
	wantAll := func(t *testing.T, count int, meddle func([]*pod)) {
		t.Helper()
		warm, failed := clones(t, count, meddle)
		if warm != count || len(failed) > 0 {
			t.Errorf("%d of %d clones began from the template, %d failed", warm, count, len(failed))
		}
		for _, p := range failed {
			l.remove(p)
		}
	}

	t.Run("in sequence", func(t *testing.T) {
		for range stress.sequence {
			if wantAll(t, 1, nil); t.Failed() {
				return
			}
		}
	})
	t.Run("at once", func(t *testing.T) {
		for range stress.rounds {
			if wantAll(t, stress.atOnce, nil); t.Failed() {
				return
			}
		}
	})
	// The kill hits any moment of a clone's way, and sometimes the time after.
	moment := func() { time.Sleep(time.Duration(rand.IntN(1200)) * time.Millisecond) }
	t.Run("daemon killed", func(t *testing.T) {
		total := 0
		for range stress.kills {
			warm, failed := clones(t, 1, func([]*pod) { moment(); restart(t, "stasisd") })
			for _, p := range failed {
				t.Errorf("clone of %s failed", p.config.Metadata.Name)
				l.remove(p)
			}
			if total += warm; t.Failed() {
				return
			}
		}
		t.Logf("%d of %d clones began from the template", total, stress.kills)
		eventually(t, "a clone after the kills", func() error {
			if warm, _ := clones(t, 1, nil); warm != 1 {
				return fmt.Errorf("it started cold")
			}
			return nil
		})
	})
	t.Run("shim killed", func(t *testing.T) {
		for i := range stress.kills {
			_, failed := clones(t, 1, func(pods []*pod) {
				if i%2 == 0 {
					moment()
				} else { // while CRIU is at work
					for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(time.Millisecond) {
						if m, _ := filepath.Glob("/run/containerd/runc/k8s.io/*/criu-root"); len(m) > 0 {
							break
						}
					}
					time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond)
				}
				for _, pid := range shimPIDs(pods[0].id) {
					syscall.Kill(pid, syscall.SIGKILL)
				}
			})
			for _, p := range failed {
				l.remove(p)
			}
			if t.Failed() {
				return
			}
		}
		wantAll(t, 1, nil)
	})
	t.Run("template removed", func(t *testing.T) {
		for i := range stress.removals {
			if i > 0 {
				makeAgain(t, source, name)
			}
			warm, failed := clones(t, stress.atOnce, func([]*pod) {
				moment()
				for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
					out, err := exec.Command("stasis", "template", "rm", "default/"+name).CombinedOutput()
					if err == nil {
						return
					}
					if !strings.Contains(string(out), "creates container") {
						t.Errorf("rm: %v: %s", err, out)
						return
					}
				}
				t.Error("the template could not be removed")
			})
			for _, p := range failed {
				t.Errorf("clone of %s failed", p.config.Metadata.Name)
				l.remove(p)
			}
			t.Logf("%d of %d clones began from the template", warm, stress.atOnce)
			if t.Failed() {
				return
			}
		}
	})
	if i, err := source.check(true); err != nil || i.id != src.id {
		t.Errorf("the source: %+v, %v", i, err)
	}
	l.remove(source)
	restart(t, "stasisd") // sweeps what a killed shim had staged
	l.check(t)
}

// makeAgain makes a template of what a pod runs.
func makeAgain(t *testing.T, source *pod, name string) {
	t.Helper()
	run(t, "stasis", "template", "create", name, "--pod", "default/"+source.config.Metadata.Name)
}

// TestCloneGC clones JVMs with each collector, on small and on huge pages, with
// few threads and with many. The heap is right in every clone, and still when the
// collector has moved it; every thread goes on.
func TestCloneGC(t *testing.T) {
	const huge = "-XX:+UseTransparentHugePages" // by madvise: the machine's setting is its own
	for what, tc := range map[string]struct {
		threads int
		flags   []string
	}{
		"parallel, huge pages":  {0, []string{"-XX:+UseParallelGC", huge}},
		"g1, threads":           {200, []string{"-XX:+UseG1GC"}},
		"g1, huge pages":        {0, []string{"-XX:+UseG1GC", huge}},
		"z, threads":            {50, []string{"-XX:+UseZGC"}},
		"z, generational":       {0, []string{"-XX:+UseZGC", "-XX:+ZGenerational"}},
		"serial, huge, threads": {50, []string{"-XX:+UseSerialGC", huge}},
	} {
		t.Run(what, func(t *testing.T) {
			n, name := newNode(t), uniqueKey(t)
			l := newLeavings(name)
			removeTemplate(t, name)
			command := warm(48, tc.threads, append(tc.flags, "-Xmx160m")...)
			source, src := warmTemplate(t, n, name, command)
			pods := []*pod{source}
			for i := range 2 * stress.collected {
				p := clonePod(n, name, checkpoint.AnnotationMemory, string(memories[i%len(memories)]))
				pods = append(pods, p)
				if _, err := p.clone(command); err != nil {
					t.Fatal(err)
				}
				if warm, err := p.checkClone(src, true); err != nil || !warm {
					t.Errorf("from the template: %v, %v; events %+v", warm, err, events(t, p.config.Metadata.Uid))
				}
				p.wantThreads(tc.threads)
			}
			if i, err := source.check(true); err != nil || i.id != src.id {
				t.Errorf("the source: %+v, %v", i, err)
			}
			source.wantThreads(tc.threads)
			for _, p := range pods {
				l.remove(p)
			}
			l.check(t)
		})
	}
}

// wantThreads fails unless all threads of a Warm live and go on counting.
func (p *pod) wantThreads(want int) {
	p.n.t.Helper()
	ask := func() (alive int, least int64) {
		body, err := p.get("threads")
		if err == nil {
			_, err = fmt.Sscan(body, &alive, &least)
		}
		if err != nil {
			p.n.t.Fatal(err)
		}
		return alive, least
	}
	_, before := ask()
	if want == 0 {
		return
	}
	eventually(p.n.t, "each thread's next step", func() error {
		if alive, after := ask(); alive != want || after <= before {
			return fmt.Errorf("%d threads, of which one has counted from %d to %d", alive, before, after)
		}
		return nil
	})
}
