// Command bench measures, inside a test node, what stasis costs ordinary
// containers and how long the phases of a dump and a restore take.
//
// Ordinary containers: create+start+stop through the stock shim and through
// ours, alternating within one run, as the ratio of medians; resident memory of
// the shims likewise. Dumps: programs with 10, 100 and 1000 MB of incompressible
// heap, phases as the shim recorded them.
//
// With -restore RUNS it compares restores instead, see restore.go.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/nri/eventlog"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// report is the JSON file. Times are in milliseconds, sizes in bytes.
type report struct {
	Pairs     int     `json:"pairs"`
	StockMs   float64 `json:"stockMedianMs"`
	StasisMs  float64 `json:"stasisMedianMs"`
	Ratio     float64 `json:"ratio"`
	StockRSS  float64 `json:"stockShimMedianRSSBytes"`
	StasisRSS float64 `json:"stasisShimMedianRSSBytes"`
	RSSRatio  float64 `json:"rssRatio"`
	Dumps     []dump  `json:"dumps"`
}

type dump struct {
	HeapMB       int     `json:"heapMB"`
	Bytes        int64   `json:"bytes"`
	BytesRatio   float64 `json:"bytesPerMemoryByte"`
	FreezeMs     float64 `json:"freezeMs"`
	CRIUMs       float64 `json:"criuMs"`
	CRIUFrozenMs float64 `json:"criuFrozenMs"`
	CopyMs       float64 `json:"copyMs"`
	FsyncMs      float64 `json:"fsyncMs"`
	CommitMs     float64 `json:"commitMs"`
	// Pause is from before the freeze until after the commit: the container
	// does not run on after its state was saved. Own is what of it is neither
	// CRIU's call, nor the copy, nor the disk's.
	PauseMs   float64 `json:"pauseMs"`
	OwnMs     float64 `json:"pauseOwnMs"`
	StopMs    float64 `json:"stopMs"`
	RestoreMs float64 `json:"createStartRestoredMs"`
	ColdMs    float64 `json:"createStartColdMs"`
}

func main() {
	pairs := flag.Int("pairs", 30, "pairs of ordinary containers")
	out := flag.String("o", "", "JSON file")
	runs := flag.Int("restore", 0, "compare lazy and eager restores, so many of each")
	sizes := flag.String("sizes", "30,100,1000", "with -restore: heaps in MB")
	flag.Parse()
	if err := run(context.Background(), *pairs, *runs, *sizes, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type client struct {
	rt cri.RuntimeServiceClient
	im cri.ImageServiceClient
}

func run(ctx context.Context, pairs, runs int, sizes, out string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	defer cancel()
	conn, err := grpc.NewClient("unix:///run/containerd/containerd.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	c := client{cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)}
	for _, image := range []string{"busybox", "python"} {
		if _, err := c.im.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "127.0.0.1:5000/" + image + ":latest"}}); err != nil {
			return err
		}
	}
	if runs > 0 {
		r, err := c.restores(ctx, runs, sizes)
		if err != nil {
			return err
		}
		r.print()
		return writeJSON(out, r)
	}
	r := report{Pairs: pairs}
	if err := c.ordinary(ctx, &r); err != nil {
		return err
	}
	for _, mb := range []int{10, 100, 1000} {
		d, err := c.dump(ctx, mb)
		if err != nil {
			return fmt.Errorf("dump of %d MB: %w", mb, err)
		}
		r.Dumps = append(r.Dumps, d)
	}
	r.print()
	return writeJSON(out, r)
}

func writeJSON(out string, r any) error {
	if out == "" {
		return nil
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(out, append(b, '\n'), 0o644)
}

func (r report) print() {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "ordinary containers, %d pairs\tstock\tstasis\tratio\t\n", r.Pairs)
	fmt.Fprintf(w, "create+start+stop, median ms\t%.1f\t%.1f\t%.3f\t\n", r.StockMs, r.StasisMs, r.Ratio)
	fmt.Fprintf(w, "resident memory of a shim, MiB\t%.1f\t%.1f\t%.3f\t\n", r.StockRSS/(1<<20), r.StasisRSS/(1<<20), r.RSSRatio)
	fmt.Fprintln(w)
	fmt.Fprintln(w, "heap MB\tfreeze\tCRIU\tof it frozen\tcopy\tfsync\tcommit\tpause\tour own\tstop in all\trestore\tcold\tMB written\tper memory\t")
	for _, d := range r.Dumps {
		fmt.Fprintf(w, "%d\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.3f\t\n", d.HeapMB,
			d.FreezeMs, d.CRIUMs, d.CRIUFrozenMs, d.CopyMs, d.FsyncMs, d.CommitMs, d.PauseMs, d.OwnMs, d.StopMs, d.RestoreMs, d.ColdMs, float64(d.Bytes)/1e6, d.BytesRatio)
	}
	w.Flush()
	fmt.Println("times in ms; restore and cold are CreateContainer+StartContainer as a client sees them, cold without the heap being filled")
}

func (c client) pod(ctx context.Context, name, handler string, annotations map[string]string) (string, *cri.PodSandboxConfig, error) {
	config := &cri.PodSandboxConfig{
		Metadata:    &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "bench"},
		Annotations: annotations,
		Linux:       &cri.LinuxPodSandboxConfig{},
	}
	r, err := c.rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	if err != nil {
		return "", nil, err
	}
	return r.PodSandboxId, config, nil
}

func (c client) removePod(ctx context.Context, id string) error {
	if _, err := c.rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := c.rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

func (c client) start(ctx context.Context, pod string, config *cri.PodSandboxConfig, image string, command []string) (string, error) {
	r, err := c.rt.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"},
		Image:    &cri.ImageSpec{Image: "127.0.0.1:5000/" + image + ":latest"},
		Command:  command,
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}})
	if err != nil {
		return "", err
	}
	_, err = c.rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: r.ContainerId})
	return r.ContainerId, err
}

func (c client) stop(ctx context.Context, id string) error {
	_, err := c.rt.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id, Timeout: 60})
	return err
}

// ordinary alternates between the handlers, so that what else the machine does
// falls on both.
func (c client) ordinary(ctx context.Context, r *report) error {
	times := map[string][]float64{}
	rss := map[string][]float64{}
	for i := range r.Pairs + 2 { // the first two warm the caches
		handlers := []string{"runc", "stasis"}
		if i%2 == 1 {
			slices.Reverse(handlers)
		}
		for _, h := range handlers {
			pod, config, err := c.pod(ctx, fmt.Sprintf("ordinary-%s-%d", h, i), h, nil)
			if err != nil {
				return err
			}
			begin := time.Now()
			id, err := c.start(ctx, pod, config, "busybox", []string{"/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.01; done"})
			if err != nil {
				return err
			}
			mem, err := shimRSS(pod)
			if err != nil {
				return err
			}
			if err := c.stop(ctx, id); err != nil {
				return err
			}
			if i >= 2 {
				times[h] = append(times[h], ms(time.Since(begin)))
				rss[h] = append(rss[h], mem)
			}
			if err := c.removePod(ctx, pod); err != nil {
				return err
			}
		}
	}
	r.StockMs, r.StasisMs = median(times["runc"]), median(times["stasis"])
	r.Ratio = r.StasisMs / r.StockMs
	r.StockRSS, r.StasisRSS = median(rss["runc"]), median(rss["stasis"])
	r.RSSRatio = r.StasisRSS / r.StockRSS
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median(v []float64) float64 {
	slices.Sort(v)
	if len(v) == 0 {
		return 0
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// shimRSS is the resident memory of the sandbox's shim in bytes.
func shimRSS(sandbox string) (float64, error) {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(b, []byte("containerd-shim-")) || !bytes.Contains(b, []byte(sandbox)) {
			continue
		}
		status, err := os.ReadFile(filepath.Join(filepath.Dir(name), "status"))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(status)) {
			var kb float64
			if n, _ := fmt.Sscanf(line, "VmRSS: %f kB", &kb); n == 1 {
				return kb * 1024, nil
			}
		}
	}
	return 0, fmt.Errorf("no shim of sandbox %s", sandbox)
}

func (c client) dump(ctx context.Context, mb int) (d dump, err error) {
	d.HeapMB = mb
	key := fmt.Sprintf("heap-%d", mb)
	// A file tells when the heap is full: the log is not needed for it.
	command := []string{"python3", "-c", fmt.Sprintf(
		"import os,time\nheap=[os.urandom(1<<20) for _ in range(%d)]\nopen('/ready','w').close()\nwhile True: time.sleep(0.05)", mb)}
	annotations := map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: key}
	for round := range 2 {
		pod, config, err := c.pod(ctx, fmt.Sprintf("%s-%d", key, round), "stasis", annotations)
		if err != nil {
			return d, err
		}
		begin := time.Now()
		id, err := c.start(ctx, pod, config, "python", command)
		if err != nil {
			return d, err
		}
		started := ms(time.Since(begin))
		if round == 1 {
			d.RestoreMs = started
			e, err := last(key)
			if err != nil {
				return d, err
			}
			if e.Type != event.Restored {
				return d, fmt.Errorf("not restored: %s %s", e.Type, e.Reason)
			}
			return d, c.removePod(ctx, pod)
		}
		d.ColdMs = started
		for {
			r, err := c.rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"test", "-e", "/ready"}, Timeout: 10})
			if err != nil {
				return d, err
			}
			if r.ExitCode == 0 {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		stats, err := c.rt.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: id})
		if err != nil {
			return d, err
		}
		memory := stats.GetStats().GetMemory().GetRssBytes().GetValue()
		begin = time.Now()
		if err := c.stop(ctx, id); err != nil {
			return d, err
		}
		d.StopMs = ms(time.Since(begin))
		e, err := last(key)
		if err != nil {
			return d, err
		}
		if e.Type != event.Dumped || e.Timings == nil {
			return d, fmt.Errorf("not dumped: %s %s", e.Type, e.Reason)
		}
		micros := func(n int64) float64 { return float64(n) / 1000 }
		d.FreezeMs, d.CRIUMs, d.CRIUFrozenMs = micros(e.Timings.FreezeMicros), micros(e.Timings.CRIUMicros), micros(e.Timings.FrozenMicros)
		d.CopyMs, d.FsyncMs, d.CommitMs = micros(e.Timings.CopyMicros), micros(e.Timings.FsyncMicros), micros(e.Timings.CommitMicros)
		d.OwnMs = d.FreezeMs + d.CommitMs
		d.PauseMs = d.OwnMs + d.CRIUMs + d.CopyMs + d.FsyncMs
		d.Bytes = e.SizeBytes
		if memory > 0 {
			d.BytesRatio = float64(e.SizeBytes) / float64(memory)
		}
		if err := c.removePod(ctx, pod); err != nil {
			return d, err
		}
	}
	return d, nil
}

const root = "/var/lib/stasis"

// last returns the newest event of a key.
func last(key string) (e event.Event, err error) {
	err = eventlog.Read(root, func(x event.Event) {
		if x.Identity != nil && x.Identity.Key == key {
			e = x
		}
	})
	return e, err
}
