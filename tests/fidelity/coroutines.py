import asyncio


async def work(n):
    await asyncio.sleep(0.01 * n)
    return n


async def main():
    print(await asyncio.gather(*(work(n) for n in range(3))))
    process = await asyncio.create_subprocess_exec("echo", "async child", stdout=asyncio.subprocess.PIPE)
    print(await process.stdout.read(), await process.wait())
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0.01)
    raise ValueError("out of main")


asyncio.run(main())
