package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// Restores: a program with so much memory is made a template, and clones of it
// are started through CRI, in turn with their memory filled after the start and
// before it, in a pod that is there already. All times are from the call of
// CreateContainer: until StartContainer has returned; until an answer over TCP
// that needs one page of the heap; until one that needs a byte of every page.
// The floor is the first of them for a container that just sleeps.

// restoreReport is the JSON file. Times are in milliseconds.
type restoreReport struct {
	Runs    int           `json:"runs"`
	FloorMs []float64     `json:"floorMs"` // sorted, like the others
	Heaps   []heapRestore `json:"heaps"`
}

type heapRestore struct {
	HeapMB int `json:"heapMB"`
	// Times by kind of memory, lazy and eager.
	Times map[checkpoint.Memory]*restoreTimes `json:"times"`
}

type restoreTimes struct {
	StartMs []float64 `json:"startMs"`
	FirstMs []float64 `json:"firstAnswerMs"`
	AllMs   []float64 `json:"allMemoryMs"`
	// PhasesMs are the parts of what the shim did, by name, "outside" what
	// containerd, NRI and the daemon did until StartContainer had returned.
	PhasesMs map[string][]float64 `json:"phasesMs"`
}

// phases are those of a restore, see [event.Phase], in their order.
var phases = []string{"claim", "prepare", "verify", "layers", "create", "pager", "tmpfs", "criu", "runc", "outside"}

const answering = `
import os, socket
blocks = [os.urandom(1 << 20) for _ in range(%d)]
pages = [b[::4096] for b in blocks]
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", 7000))
s.listen(16)
n = 0
while True:
    c, _ = s.accept()
    n = (n + 7) %% len(blocks)
    look = range(len(blocks)) if c.recv(16) == b"all" else [n]
    c.sendall(b"ok" if all(blocks[i][::4096] == pages[i] for i in look) else b"lost")
    c.close()
`

var kinds = []checkpoint.Memory{checkpoint.MemoryLazy, checkpoint.MemoryEager}

func (c client) restores(ctx context.Context, runs int, sizes string) (r restoreReport, err error) {
	r.Runs = runs
	for s := range strings.SplitSeq(sizes, ",") {
		mb, err := strconv.Atoi(s)
		if err != nil || mb < 1 {
			return r, fmt.Errorf("-sizes %q: want positive numbers", sizes)
		}
		r.Heaps = append(r.Heaps, heapRestore{HeapMB: mb})
	}
	for i := range r.Heaps {
		if err := c.heap(ctx, runs, &r.Heaps[i]); err != nil {
			return r, fmt.Errorf("%d MB: %w", r.Heaps[i].HeapMB, err)
		}
	}
	for range runs {
		pod, config, err := c.pod(ctx, "floor", "stasis", nil)
		if err != nil {
			return r, err
		}
		begin := time.Now()
		if _, err := c.start(ctx, pod, config, "busybox", []string{"sleep", "1000"}); err != nil {
			return r, err
		}
		r.FloorMs = append(r.FloorMs, ms(time.Since(begin)))
		if err := c.removePod(ctx, pod); err != nil {
			return r, err
		}
	}
	slices.Sort(r.FloorMs)
	return r, nil
}

func (c client) heap(ctx context.Context, runs int, h *heapRestore) (err error) {
	h.Times = map[checkpoint.Memory]*restoreTimes{}
	for _, k := range kinds {
		h.Times[k] = &restoreTimes{PhasesMs: map[string][]float64{}}
	}
	name := fmt.Sprintf("heap-%d", h.HeapMB)
	command := []string{"python3", "-c", fmt.Sprintf(answering, h.HeapMB)}
	source, config, err := c.pod(ctx, name, "stasis", map[string]string{checkpoint.AnnotationPolicy: string(checkpoint.PolicyTemplate)})
	if err != nil {
		return err
	}
	if _, err := c.start(ctx, source, config, "python", command); err != nil {
		return err
	}
	netns, err := c.netns(ctx, source)
	if err != nil {
		return err
	}
	if _, err := ask(netns, "all"); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "stasis", "template", "create", name, "--pod", "bench/"+name).CombinedOutput(); err != nil {
		return fmt.Errorf("template create: %w: %s", err, out)
	}
	defer func() {
		if out, rerr := exec.CommandContext(ctx, "stasis", "template", "rm", "bench/"+name).CombinedOutput(); err == nil && rerr != nil {
			err = fmt.Errorf("template rm: %w: %s", rerr, out)
		}
	}()
	if err := c.removePod(ctx, source); err != nil {
		return err
	}
	for i := range runs + 1 { // the first of each warms the caches
		order := slices.Clone(kinds)
		if i%2 == 1 {
			slices.Reverse(order)
		}
		for _, k := range order {
			start, first, all, parts, err := c.clone(ctx, name, k, command, i)
			if err != nil {
				return fmt.Errorf("%s: %w", k, err)
			}
			if t := h.Times[k]; i > 0 {
				t.StartMs, t.FirstMs, t.AllMs = append(t.StartMs, ms(start)), append(t.FirstMs, ms(first)), append(t.AllMs, ms(all))
				outside := ms(start)
				for _, p := range parts {
					took := float64(p.Micros) / 1e3
					t.PhasesMs[p.Name] = append(t.PhasesMs[p.Name], took)
					outside -= took
				}
				t.PhasesMs["outside"] = append(t.PhasesMs["outside"], outside)
			}
		}
	}
	for _, t := range h.Times {
		for _, v := range slices.AppendSeq([][]float64{t.StartMs, t.FirstMs, t.AllMs}, maps.Values(t.PhasesMs)) {
			slices.Sort(v)
		}
	}
	return nil
}

// clone measures one clone, and fails where it was not restored as wanted.
func (c client) clone(ctx context.Context, template string, k checkpoint.Memory, command []string, i int) (start, first, all time.Duration, parts []event.Phase, err error) {
	uid := fmt.Sprintf("%s-%s-%d", template, k, i)
	pod, config, err := c.pod(ctx, uid, "stasis", map[string]string{checkpoint.AnnotationTemplate: template, checkpoint.AnnotationMemory: string(k)})
	if err != nil {
		return 0, 0, 0, nil, err
	}
	netns, err := c.netns(ctx, pod)
	if err != nil {
		return 0, 0, 0, nil, err
	}
	begin := time.Now()
	id, err := c.start(ctx, pod, config, "python", command)
	if err != nil {
		return 0, 0, 0, nil, err
	}
	start = time.Since(begin)
	at, err := ask(netns, "one")
	if err != nil {
		return 0, 0, 0, nil, err
	}
	first = at.Sub(begin)
	if at, err = ask(netns, "all"); err != nil {
		return 0, 0, 0, nil, err
	}
	all = at.Sub(begin)
	e, err := last(uid)
	if err != nil {
		return 0, 0, 0, nil, err
	}
	if e.Type != event.Restored {
		return 0, 0, 0, nil, fmt.Errorf("not restored: %s %s", e.Type, e.Reason)
	}
	b, err := os.ReadFile(filepath.Join("/run/containerd/io.containerd.runtime.v2.task/k8s.io", id, "work/restore.log"))
	if err != nil {
		return 0, 0, 0, nil, err
	}
	if lazy := strings.Contains(string(b), "uffd"); lazy != (k == checkpoint.MemoryLazy) {
		return 0, 0, 0, nil, fmt.Errorf("lazy %v: %s", lazy, e.Reason)
	}
	return start, first, all, e.Phases, c.removePod(ctx, pod)
}

// ask asks the program in the network namespace and returns the time of its
// answer.
func ask(netns, what string) (at time.Time, err error) {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked, so that the thread ends with its namespace
		done <- func() error {
			f, err := os.Open(netns)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter %s: %w", netns, err)
			}
			var conn net.Conn
			for end := time.Now().Add(5 * time.Minute); ; time.Sleep(time.Millisecond) {
				if conn, err = net.Dial("tcp4", "127.0.0.1:7000"); err == nil {
					break
				} else if time.Now().After(end) {
					return err
				}
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(5 * time.Minute))
			if _, err := conn.Write([]byte(what)); err != nil {
				return err
			}
			answer := make([]byte, 16)
			n, err := conn.Read(answer)
			at = time.Now()
			if err != nil {
				return err
			}
			if string(answer[:n]) != "ok" {
				return fmt.Errorf("memory is %q", answer[:n])
			}
			return nil
		}()
	}()
	err = <-done
	return at, err
}

// netns is the path of the pod's network namespace.
func (c client) netns(ctx context.Context, pod string) (string, error) {
	r, err := c.rt.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		return "", err
	}
	var info struct {
		RuntimeSpec struct {
			Linux struct {
				Namespaces []struct{ Type, Path string }
			}
		}
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		return "", fmt.Errorf("info of the sandbox: %w", err)
	}
	for _, ns := range info.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" && ns.Path != "" {
			return ns.Path, nil
		}
	}
	return "", fmt.Errorf("sandbox %s has no network namespace", pod)
}

func (r restoreReport) print() {
	spread := func(v []float64) string {
		if len(v) == 0 {
			return "-"
		}
		return fmt.Sprintf("%.0f (%.0f-%.0f)", median(v), v[0], v[len(v)-1])
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "heap MB\tmemory\tstarted\tfirst answer\tall memory\t")
	for _, h := range r.Heaps {
		for _, k := range kinds {
			t := h.Times[k]
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t\n", h.HeapMB, k, spread(t.StartMs), spread(t.FirstMs), spread(t.AllMs))
		}
	}
	fmt.Fprintf(w, "\tfloor\t%s\t\t\t\n", spread(r.FloorMs))
	w.Flush()
	fmt.Println()
	fmt.Fprintf(w, "heap MB\tmemory\t%s\t\n", strings.Join(phases, "\t"))
	for _, h := range r.Heaps {
		for _, k := range kinds {
			fmt.Fprintf(w, "%d\t%s\t", h.HeapMB, k)
			for _, name := range phases {
				v := "-"
				if took := h.Times[k].PhasesMs[name]; len(took) > 0 {
					v = fmt.Sprintf("%.1f", median(took))
				}
				fmt.Fprintf(w, "%s\t", v)
			}
			fmt.Fprintln(w)
		}
	}
	w.Flush()
	fmt.Printf("ms from CreateContainer on, median (least-greatest) of %d, lazy and eager in turn; floor: a container that sleeps;\nbelow the parts of a start, medians; outside: of containerd, NRI and the daemon\n", r.Runs)
}
